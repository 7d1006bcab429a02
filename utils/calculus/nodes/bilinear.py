"""Bilinear maps phi(x, y) + b: the kinds whose second derivative couples two inputs. Source: Lemma
5 (lem:bilinear).

    D [x', y', b']  =  phi(x', y) + phi(x, y') + b'
    D^T lam         =  (left(lam, y), right(lam, x), lam)
    < lam, D^2 phi > =  (left(lam, y'), right(lam, x'), 0)

left and right are the adjoints of phi in x and in y. With lam as a matrix C between the entries of
x and of y, and C = U S V^T, the majorant of 2 < x', C y' > has the halves U S U^T on x' and V S V^T
on y'.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.nodes.arrays import aligned, plus, sum_to
from utils.calculus.nodes.base import (
    Form,
    Forward,
    Leaves,
    Maybe,
    Node,
    Parts,
    Roots,
    Shape,
    Shapes,
    Wanted,
)
from utils.calculus.nodes.known import Known


class Bilinear(Node):
    """phi(x, y), or phi(x, y) + b. Subclasses give `product`, `left`, `right` and `halves`."""

    couples = True

    def __init__(self, shape: Shape, inner: Shapes):
        self.shape = tuple(shape)
        self.inner = [tuple(s) for s in inner]

    @abstractmethod
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """phi(x, y)."""

    @abstractmethod
    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        """The adjoint of x -> phi(x, y) at lam."""

    @abstractmethod
    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        """The adjoint of y -> phi(x, y) at lam; `summed`: over the examples, where that is free."""

    @abstractmethod
    def halves(self, lam: Tensor) -> Form:
        """The map (dz, dout) -> (U S U^T x', V S V^T y') of lam = U S V^T."""

    def forward(self, *z: Tensor) -> Forward:
        out = self.product(z[0], z[1])
        if len(z) == 3:
            out = out + aligned(z[2], len(self.shape))
        return out, (z[0], z[1])

    def tangent(self, saved: tuple, dz: Parts) -> Maybe:
        x, y = saved
        out = None
        if dz[0] is not None:
            out = self.product(dz[0], y)
        if dz[1] is not None:
            out = plus(out, self.product(x, dz[1]))
        if len(dz) == 3 and dz[2] is not None:
            bias = aligned(dz[2], len(self.shape))
            out = bias.expand(-1, *self.shape) if out is None else out + bias
        return out

    def adjoint(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Parts:
        x, y = saved
        parts = [None] * len(wanted)
        if wanted[0]:
            parts[0] = self.left(lam, y)
        if wanted[1]:
            parts[1] = self.right(lam, x, wanted[1] == 2)
        if len(wanted) == 3 and wanted[2]:
            parts[2] = sum_to(lam, self.inner[2])
        return tuple(parts)

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        rest = (None,) * (len(wanted) - 2)

        def form(dz: Parts, dout: Maybe) -> Parts:
            x = None if dz[1] is None else self.left(lam, dz[1])
            y = None if dz[0] is None else self.right(lam, dz[0], wanted[1] == 2)
            return (x, y, *rest)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        halves = self.halves(lam)
        rest = (None,) * (len(wanted) - 2)

        def form(dz: Parts, dout: Maybe) -> Parts:
            if dz[0] is None or dz[1] is None:  # what does not move is coupled with nothing
                return (None,) * len(wanted)
            return (*halves(dz, dout), *rest)

        return form

    def roots(
        self,
        saved: tuple,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
        leaves: Leaves,
    ) -> Roots:
        """Beside a parameter y itself, R x' is the gradient in y of < lam, D^2 phi [x', .] >."""
        if not (wanted[0] and wanted[1]):
            return ()
        for leaf, other in ((1, 0), (0, 1)):
            if leaves[leaf]:
                rows = [None] * len(wanted)
                rows[other] = self.coupling(lam, other, shapes)
                return tuple(rows), leaf
        return self.half_roots(saved, lam, wanted, shapes)

    def coupling(self, lam: Tensor, place: int, shapes: Shapes) -> Tensor:
        """Rows R with |R x'| = |the gradient in the other input of < lam, phi(x', .) >|, x' at
        `place`; `shapes` of the inputs."""
        other = shapes[1 - place]
        units = torch.eye(math.prod(other), dtype=lam.dtype, device=lam.device)
        units = units.reshape(-1, *other)
        return self.left(lam, units) if place == 0 else self.right(lam, units)

    def half_roots(
        self,
        saved: tuple,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
    ) -> Roots:
        """Roots of the two halves of `halves`; saved, lam, wanted, shapes as in `roots`."""
        none = (False,) * len(wanted)
        return Node.roots(self, saved, lam, wanted, shapes, none)

    def joint(self, jet: Jet, moved: Tensor, bias: Sequence[Known], rows: float) -> tuple:
        """`jet` and displacement `moved` with a `bias`, one or none, of another group than the
        second input's, copied to `rows` rows."""
        for b in bias:
            jet = jet + b.jet.linear(math.sqrt(rows))
            moved = moved + math.sqrt(rows) * b.moved
        return jet, moved


def same_group(y: Known, bias: Sequence[Known]) -> bool:
    """Whether a bias, one or none, is another parameter of the second input y's group of weights:
    the two are then orthogonal parts of one variable."""
    if not bias or y.group is None:
        return False
    return y.group == bias[0].group and y.name != bias[0].name
