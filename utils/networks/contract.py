"""The gate: what a model and its examples have to satisfy, checked once before anything is spent.

The loss of an example has to be a function of the weights and of that example alone, and a finite
number, for every example.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.networks.copies import first_sentence, prepared_copy, second_order_mode
from utils.networks.labels import as_tensor, fitting_labels
from utils.networks.losses import check_loss, logits_of, loss_from_logits
from utils.networks.memory import MEMORY, activation_numbers
from utils.run.streams import generator

TOGETHER = 64  # examples of a forward pass, at most
ALONE = 16  # so few examples are also asked one by one
AGREE = 1e-4  # of the size of an output: what rounding may do in another batch


class Admitted(NamedTuple):
    """A copy of the model for computing, and the examples in its precision and on its device."""

    model: nn.Module
    x: Tensor
    y: Tensor


def admit(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: str = "cross_entropy",
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    memory: int = MEMORY,
) -> Admitted:
    """Check a model and its examples, all of them.

    model   maps inputs to logits or values (n, K) or (n, T, K)
    x, y    inputs (n, ...) and labels (`fitting_labels`), arrays of torch or numpy
    loss    one of `LOSSES`
    dtype   of the computation
    device  of the computation, the model's if None
    memory  for a forward pass [bytes]

    Raises ValueError, one sentence, where an output is random, depends on the other examples or is
    no finite number, where labels do not fit, or where the model is none that can be measured.

    >>> admit(nn.Linear(2, 3), [[1.0, 2.0]], [2]).y
    tensor([2])
    """
    check_loss(loss)
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() forbids derivatives: leave it before measuring.")
    twin = prepared_copy(model, dtype, device)
    where = next(twin.parameters()).device
    x, y = _as_many(as_tensor(x, "x"), as_tensor(y, "y"))
    x = x.to(where, dtype) if x.is_floating_point() else x.to(where)
    y = y.to(where, dtype) if y.is_floating_point() else y.to(where)
    bad = _first_bad(x)
    if bad is not None:
        raise ValueError(f"Input {bad} holds NaN or infinity: remove that example.")
    with torch.random.fork_rng():
        f = _output(twin, x[:1])
        y = fitting_labels(y, (len(x), *f.shape[1:]), loss)
        size = f.element_size() * activation_numbers(twin, x[:1])
        _check_outputs(twin, x, y, loss, max(1, min(TOGETHER, memory // max(size, 1))))
    return Admitted(twin, x, y)


def _as_many(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    counts = [len(t) if t.ndim else 0 for t in (x, y)]
    if counts[0] != counts[1] or counts[0] == 0:
        raise ValueError(
            f"x has {counts[0]} examples and y has {counts[1]}: "
            "give as many labels as inputs, at least one."
        )
    return x, y


def _first_bad(values: Tensor) -> int | None:
    """The first example with a number that is not finite."""
    finite = values.flatten(1).isfinite().all(1) if values.ndim > 1 else values.isfinite()
    return None if finite.all() else int((~finite).nonzero()[0])


def _output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output (n, K) or (n, T, K) for x, or ValueError."""
    try:
        with torch.no_grad(), second_order_mode():
            output = model(x.clone())
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"The model fails on inputs of shape {tuple(x.shape)} and type {x.dtype} "
            f"({first_sentence(error)}): give it what it was made for."
        ) from None
    f = logits_of(output)
    if f.ndim not in (2, 3) or len(f) != len(x) or not f.is_floating_point() or f.numel() == 0:
        raise ValueError(
            f"The model returns {f.dtype} of shape {tuple(f.shape)} for {len(x)} examples: "
            "it has to return logits (n, classes), or (n, tokens, classes)."
        )
    return f


def _check_outputs(model: nn.Module, x: Tensor, y: Tensor, loss: str, rows: int) -> None:
    """Every example's output in two batches of different company, and its loss."""
    everyone = torch.arange(len(x), device=x.device)
    sizes: list[Tensor] = []
    marks: list[Tensor] = []
    for some in everyone.split(rows):
        f = _output(model, x[some])
        bad = _first_bad(f)
        if bad is None:
            bad = _first_bad(loss_from_logits(f, y[some], loss))
        if bad is not None:
            raise ValueError(
                f"The output or the loss of example {int(some[bad])} is no finite number: "
                "look at the example and at the weights."
            )
        if not marks and not torch.equal(f, _output(model, x[some])):
            raise ValueError(
                "The model gives two outputs for one input: switch its randomness off."
            )
        sizes.append(f.flatten(1).norm(dim=1))
        marks.append(_marks(f))
    size = torch.cat(sizes)[:, None]
    mark = torch.cat(marks)
    fewer = 1 if len(x) <= ALONE else max(1, rows // 2 - 1)
    groups = -(-len(x) // fewer)
    for start in range(groups):  # neighbours above are in different batches now
        some = everyone[start::groups]
        difference = (_marks(_output(model, x[some])) - mark[some]).abs()
        apart = (difference > AGREE * size[some]).any(1)
        if apart.any():
            raise ValueError(
                f"The output for example {int(some[apart][0])} depends on the other examples of "
                "its batch: remove what mixes them."
            )


def _marks(f: Tensor) -> Tensor:
    """Two numbers (n, 2) that tell outputs apart without keeping them: products with random
    directions, the same for all."""
    stream = generator("marks of outputs", 0)
    directions = torch.randn(f[0].numel(), 2, generator=stream, dtype=torch.float64)
    return f.flatten(1) @ directions.to(f)


def refuse_other_training(model: nn.Module, x: Tensor) -> None:
    """Raise ValueError where the model computes something else in training mode than in evaluation
    mode: dropout, batch statistics.

    x  inputs (n, ...), of which the first eight are looked at, or as many as there are

    >>> refuse_other_training(nn.Dropout(0.0), torch.ones(2, 3))
    """
    twin = copy.deepcopy(model)
    x = x[:8].to(next(iter(twin.parameters()), x).dtype) if x.is_floating_point() else x[:8]
    with torch.random.fork_rng():
        f = _output(twin.eval(), x)
        same = torch.allclose(_output(twin.train(), x), f, rtol=AGREE, atol=AGREE * f.abs().max())
    if not same:
        raise ValueError(
            "The model computes something else in training mode (dropout, batch statistics), and "
            "this training has neither: build it without, or train it yourself and give weights."
        )
