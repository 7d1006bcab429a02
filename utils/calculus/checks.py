"""Whether a chain is the network it was read off: the same outputs on a batch, and symmetric
Hessians."""

from __future__ import annotations

import math
from weakref import WeakSet

import torch
from torch import Tensor

from utils.calculus.chain import Chain
from utils.calculus.tape import Named, Tape
from utils.calculus.trace import Untraceable
from utils.run.streams import generator


def check_chain(tape: Tape, output: Tensor, gradient: dict[str, Tensor | None]) -> None:
    """Check a chain by a few examples: outputs, gradients, and once a symmetric Hessian.

    tape      of the examples, one direction each
    output    what the network itself gives for them (n, ...)
    gradient  of the sum of their losses by automatic differentiation, by parameter

    Raises Untraceable.
    """
    check_outputs(tape, output)
    check_gradient(tape, gradient)
    if tape.chain in _symmetric:
        return
    if not symmetric(tape):
        raise Untraceable("The traced network's Hessian is not symmetric: a derivative is wrong.")
    _symmetric.add(tape.chain)


_symmetric: WeakSet[Chain] = WeakSet()


def check_gradient(tape: Tape, gradient: dict[str, Tensor | None]) -> None:
    """Raise Untraceable unless the chain's gradient is that of automatic differentiation.

    What a trace loses shows here: blocks without gradient, backward functions of one's own, hooks.
    gradient: of the sum of the losses of the tape's examples, by name; None is zero.
    """
    difference = 0.0
    size = 0.0
    for name, ours in tape.gradient().items():
        theirs = gradient[name]
        ours = 0.0 if ours is None else ours.sum(0)
        theirs = torch.zeros(()) if theirs is None else theirs
        difference += float((theirs - ours).square().sum())
        size += float(theirs.square().sum())
    if not math.isfinite(size):
        return
    narrow = bool(tape.chain.casts) or tape.losses.dtype != torch.float64
    relative = 1e-3 if narrow else 1e-7
    absolute = 1e-5 if narrow else 1e-11  # where all examples are fitted, gradients are rounding
    if not difference**0.5 <= relative * size**0.5 + absolute:
        raise Untraceable(
            "The traced network has another gradient than the network: a block without gradient, "
            "a backward function of its own, or a hook."
        )


def check_outputs(tape: Tape, output: Tensor) -> None:
    """Raise Untraceable unless the chain computes what the network gives for the batch of the tape,
    its output (n, ...).

    A chain is traced for one example: batch statistics, and all else that couples the examples of a
    batch, show here and nowhere else. Where the network names a narrower type (`chain.casts`), its
    own outputs have that accuracy.
    """
    chain = tape.chain
    ours = tape.values[chain.output]
    ours = ours.expand(len(output), *ours.shape[1:]).reshape(output.shape)
    if not output.isfinite().all():
        return  # nothing can be said; whoever uses the numbers refuses them
    narrow = bool(chain.casts) or output.dtype != torch.float64
    error = (ours - output).abs().max()
    scale = output.abs().max().clamp_min(1e-30)
    if not error <= (1e-4 if narrow else 1e-8) * scale:
        raise Untraceable(
            f"Traced for one example the network gives another output than for a batch (relative "
            f"difference {float(error / scale):.1e}): its examples are not independent."
        )


def asymmetry(tape: Tape, seed: int = 0) -> float:
    """max_i |w.h_i u - u.h_i w| / (|w| |h_i u| + |u| |h_i w|) for random u, w: a wrong derivative
    rarely stays symmetric.

    tape  of a batch, one direction an example (sums=False)
    seed  of the two directions

    Cost: two products.
    """
    like = next(iter(tape.adjoints.values()))
    stream = generator("symmetry", seed)
    n = len(tape.losses)

    def direction() -> Named:
        shapes = {name: tape.values[name].shape[1:] for name in tape.moving}
        drawn = {
            k: torch.randn(n, *s, generator=stream, dtype=torch.float64) for k, s in shapes.items()
        }
        return {name: t.to(like) for name, t in drawn.items()}

    def flat(tensors: dict[str, Tensor | None]) -> Tensor:
        parts = [torch.zeros_like(u[name]) if t is None else t for name, t in tensors.items()]
        return torch.cat([part.reshape(n, -1) for part in parts], 1)

    u = direction()
    w = direction()
    hu = flat(tape.product(u))
    hw = flat(tape.product(w))
    largest = torch.maximum(hu.abs().amax(1), hw.abs().amax(1)).clamp_min(1e-300)[:, None]
    hu, hw = hu / largest, hw / largest  # whose squares could be 0 though they are not
    u, w = flat(u), flat(w)
    size = w.norm(dim=1) * hu.norm(dim=1) + u.norm(dim=1) * hw.norm(dim=1)
    difference = ((w * hu).sum(1) - (u * hw).sum(1)).abs()
    return (difference / size.clamp_min(torch.finfo(size.dtype).tiny)).max().item()


def symmetric(tape: Tape) -> bool:
    """Whether the probe of `asymmetry` of the tape finds no more than rounding, which is small
    beside what a wrong node does."""
    single = tape.losses.dtype == torch.float32
    return asymmetry(tape) <= (1e-3 if single else 1e-8)
