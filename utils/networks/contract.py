"""What a model has to satisfy: the loss of an example is a smooth function of the weights alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from utils.networks.losses import IGNORED, logits


@contextmanager
def second_order_mode() -> Iterator[None]:
    """Attention by its mathematical kernel: the fused ones have no second derivative.

    >>> with second_order_mode():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def prepared_copy(
    model: nn.Module,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A copy of `model` in eval mode and in `dtype`, all its weights free to move.

    device  of the copy; default: where the model is

    The model handed in keeps its `.grad`, modes and frozen weights. Complex buffers stay complex.
    Raises ValueError for complex weights.

    >>> prepared_copy(nn.Linear(2, 3)).weight.dtype
    torch.float64
    """
    for name, p in model.named_parameters():
        if p.is_complex():
            raise ValueError(f"{name} is complex: split it into its real and imaginary part.")
    twin = copy.deepcopy(model)
    waves = {name: b for name, b in twin.named_buffers() if b.is_complex()}
    waves = {name: b.clone() for name, b in waves.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would take the real part; it is put back below
        twin = twin.to(device=device, dtype=dtype).eval()
    for name, b in waves.items():
        owner, _, last = name.rpartition(".")
        wide = b.to(device=device, dtype=torch.promote_types(dtype, torch.complex64))
        setattr(twin.get_submodule(owner), last, wide)
    for p in twin.parameters():
        p.grad = None
        p.requires_grad_(True)
    return twin


def refuse_random_or_batch_dependent(model: nn.Module, x: Tensor) -> None:
    """Raise ValueError unless l_i(w) is a function of the weights w and of example i alone.

    model  in eval mode; maps inputs to logits (n, K) or (n, T, K), without batch statistics
    x      inputs (n, ...), of which the first two are looked at

    >>> refuse_random_or_batch_dependent(nn.Linear(2, 3), torch.zeros(4, 2))
    """
    _refuse_modules(model)
    with torch.no_grad(), second_order_mode():
        together = logits(model, x[:2])
        again = logits(model, x[:2])
        alone = logits(model, x[:1])
    if together.ndim not in (2, 3):
        shape = tuple(together.shape)
        raise ValueError(
            f"The model returns shape {shape}: it has to return logits (n, classes), or "
            "(n, tokens, classes)."
        )
    if not together.isfinite().all():
        raise ValueError(
            "The model's output is not a finite number: look at its weights and at the inputs."
        )
    if not torch.equal(together, again):
        raise ValueError(
            "The model gives two outputs for one input: switch its randomness off and run again."
        )
    if not torch.allclose(together[:1], alone, rtol=1e-4, atol=1e-5):
        raise ValueError(
            "The model's output for an example depends on the rest of the batch: "
            "remove that and run again."
        )


def _refuse_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"{name} uses batch statistics: replace it (LayerNorm, GroupNorm) and run again."
            )


def refuse_dropout(model: nn.Module) -> None:
    """Raise ValueError where a layer of the model drops units in training, which here has none.

    >>> refuse_dropout(nn.Dropout(0.0))
    """
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise ValueError(
                f"{name} is dropout with p = {module.p}: build the model with p = 0 and run again."
            )


def check_labels(y: Tensor, shape: torch.Size, loss: str) -> None:
    """Raise ValueError unless the labels fit a network's output.

    y      labels (n,) or (n, T), or for "mse" also targets of the output's shape
    shape  of the output for some examples: (m, K) or (m, T, K)
    loss   "cross_entropy" or "mse"

    >>> check_labels(torch.tensor([0, 2]), torch.Size([1, 3]), "cross_entropy")
    """
    if y.is_floating_point() and loss == "mse":
        if y.shape[1:] != shape[1:]:
            raise ValueError(
                f"The targets have shape {tuple(y.shape)}, the output {tuple(shape)}: "
                "give one target for each number of the output."
            )
        return
    if y.is_floating_point() or y.shape[1:] != shape[1:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)} and type {y.dtype}, the logits {tuple(shape)}: "
            "give one integer label for each row of logits."
        )
    counted = y[y != IGNORED] if y.ndim > 1 else y
    classes = shape[-1]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        raise ValueError(
            f"y has to hold integer classes from 0 to {classes - 1}: map the labels to them."
        )
