"""What every rung is asked about: a network's chain, the examples, and the weights that move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.calculus.chain import Chain, read_chain
from utils.calculus.checks import check_gradient, check_outputs
from utils.calculus.tape import Tape
from utils.hessian.coordinates import select_parameters
from utils.networks.contract import admit
from utils.networks.copies import second_order_mode
from utils.networks.losses import logits, loss_from_logits

ROUNDING = 1 + 1e-10  # covers that of sums of products of nonnegative numbers
FEW = 8  # examples on which the chain is held to the network


def group_of(parameter: str) -> str:
    """The module of a parameter, or its own name where it stands alone.

    >>> group_of("blocks.0.mlp.fc1.weight"), group_of("pos")
    ('blocks.0.mlp.fc1', 'pos')
    """
    return parameter.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Subject:
    """A network and examples, checked, in float64.

    model    a copy in evaluation mode; `chain` read off it
    x, y     inputs (n, ...) and labels (n,) or (n, T), or targets for "mse"
    loss     "cross_entropy", "mse" or "bce"
    groups   names of all groups of weights: the parameters of one module are one group
    kept     which of them the Hessian is taken in
    size     numbers in the largest value of one example times its last axis
    total    numbers in all values of one example
    """

    model: nn.Module
    chain: Chain
    x: Tensor
    y: Tensor
    loss: str
    groups: list[str]
    kept: list[int]
    size: int
    total: int

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.x)

    @property
    def names(self) -> list[str]:
        """The parameters of the groups kept."""
        kept = {self.groups[g] for g in self.kept}
        return [name for name, _ in self.model.named_parameters() if group_of(name) in kept]

    def tape(self, rows: Tensor, names: list[str] | None = None) -> Tape:
        """Values and adjoints of the examples in `rows`; `names` of the parameters that move."""
        names = self.names if names is None else names
        return tape_of(self.model, self.chain, self.x[rows], self.y[rows], self.loss, names)


def tape_of(
    model: nn.Module, chain: Chain, x: Tensor, y: Tensor, loss: str, names: list[str]
) -> Tape:
    """The tape of a model's chain at its own weights, of which those in `names` move, for x, y and
    loss as in `Subject`."""
    point = {name: t.detach() for name, t in model.named_parameters()} | dict(model.named_buffers())
    with torch.no_grad():
        return Tape(chain, point, x, y, loss, names)


def subject(
    model: nn.Module, x: Tensor, y: Tensor, loss: str, parameters: list[str] | None = None
) -> Subject:
    """Check a network and examples, and read the chain.

    model       any traceable module that returns logits, left unchanged
    x, y, loss  as in `Subject`
    parameters  name patterns; a group counts as a whole if one of its parameters matches

    Raises ValueError where something does not fit, Untraceable where the network cannot be read.
    """
    twin, x, y = admit(model, x, y, loss)
    chain = read_chain(twin, x)
    few = slice(FEW)
    with torch.no_grad():
        output = logits(twin, x[few])
    names = [name for name, _ in twin.named_parameters()]
    tape = tape_of(twin, chain, x[few], y[few], loss, names)
    with torch.enable_grad(), second_order_mode():
        value = loss_from_logits(logits(twin, x[few]).double(), y[few], loss).sum()
        weights = [p.requires_grad_(True) for p in twin.parameters()]
        found = torch.autograd.grad(value, weights, allow_unused=True)
    check_outputs(tape, output)
    check_gradient(tape, dict(zip(names, found, strict=True)))
    values = [t for t in tape.values.values() if t.ndim > 1]
    groups = list(dict.fromkeys(map(group_of, names)))
    return Subject(
        model=twin,
        chain=chain,
        x=x,
        y=y,
        loss=loss,
        groups=groups,
        kept=_kept(names, groups, parameters),
        size=max(math.prod(t.shape[1:]) * t.shape[-1] for t in values),
        total=sum(math.prod(t.shape[1:]) for t in values),
    )


def _kept(names: list[str], groups: list[str], patterns: list[str] | None) -> list[int]:
    """Indices of the groups with a parameter that matches."""
    chosen = set(map(group_of, select_parameters(names, patterns)))
    return [g for g, group in enumerate(groups) if group in chosen]
