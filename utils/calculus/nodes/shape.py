"""Linear maps of values: views, selections, copies, sums. Exact in every order: D^2 phi = 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.calculus.lemmas import hypot, largest
from utils.calculus.nodes.arrays import aligned, plus, sum_to
from utils.calculus.nodes.base import Forward, Maybe, Node, Parts, Shape, Shapes, Wanted
from utils.calculus.nodes.known import Inputs, Known, Situation


class Flat(Node):
    """A kind without a second derivative."""

    def second_order(self, saved: Any, lam: Tensor, wanted: Wanted) -> None:
        return None

    def majorant(self, saved: Any, lam: Tensor, wanted: Wanted) -> None:
        return None


class LinearMap(Flat):
    """A linear map A of one input. Subclasses give `apply` = A and `transpose` = A^T, both on
    arrays (n, ...); no entry of A is negative."""

    whole_rows = False  # whether each row of the output is a row of the input

    def apply(self, x: Tensor) -> Tensor:
        """A x of values x (n, *shape)."""
        raise NotImplementedError

    def transpose(self, lam: Tensor) -> Tensor:
        """A^T lam of adjoints lam (n, *shape of the output)."""
        raise NotImplementedError

    def forward(self, *z: Tensor) -> Forward:
        return self.apply(z[0]), None

    def tangent(self, saved: Any, dz: Parts) -> Maybe:
        return None if dz[0] is None else self.apply(dz[0])

    def adjoint(self, saved: Any, lam: Tensor, wanted: Wanted) -> Parts:
        return (self.transpose(lam),)

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        x = inputs[0]
        norm = schur(self.apply, self.transpose, x)
        known = Known(x.jet.linear(norm), moved=norm * x.moved, full=norm * x.full)
        if not self.whole_rows:
            return known
        return replace(known, row=x.row, spread=x.spread, centred=norm * x.centred)


def schur(apply: Callable, transpose: Callable, x: Known) -> float:
    """>= ||A|| of a map without negative entries: the root of its largest sum of a row times that
    of a column, which is the norm itself of selections, copies and sums.

    apply, transpose  A and A^T on arrays (1, *shape)
    x                 the input, for its shape
    """
    rows = apply(torch.ones_like(x.stand_in[:1]))
    columns = transpose(torch.ones_like(rows))
    return math.sqrt(float(rows.max()) * float(columns.max()))


class Reshape(LinearMap):
    """The same numbers in another shape: an isometry."""

    def __init__(self, inner: Shape, outer: Shape):
        self.inner = tuple(inner)
        self.outer = tuple(outer)
        self.whole_rows = self.inner[-1:] == self.outer[-1:]

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        x = inputs[0]
        if x.shape == self.outer:
            return x
        known = replace(super().norms(inputs, saved, at), group=x.group, name=x.name)
        old = x.shape[-1] if x.shape else 1
        new = self.outer[-1] if self.outer else 1
        if old % new == 0:  # rows in pieces
            return replace(known, row=x.row)
        return replace(known, row=math.sqrt(new / old) * x.row) if new % old == 0 else known

    def apply(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.outer)

    def transpose(self, lam: Tensor) -> Tensor:
        return lam.reshape(lam.shape[0], *self.inner)


class Permute(LinearMap):
    """The same numbers with the axes in another order: an isometry."""

    def __init__(self, order: Sequence[int]):
        self.order = tuple(order)
        self.back = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))
        self.whole_rows = self.order[-1:] == (len(self.order) - 1,)

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        return replace(super().norms(inputs, saved, at), group=inputs[0].group, name=inputs[0].name)

    def apply(self, x: Tensor) -> Tensor:
        return x.permute(0, *(axis + 1 for axis in self.order))

    def transpose(self, lam: Tensor) -> Tensor:
        return lam.permute(0, *(axis + 1 for axis in self.back))


class Select(LinearMap):
    """A part of the entries along one axis: a selection, of norm at most 1. An integer drops the
    axis."""

    def __init__(self, inner: Shape, axis: int, part: int | slice):
        self.inner = tuple(inner)
        self.axis = axis
        self.part = part
        self.index = (slice(None),) * (axis + 1) + (part,)
        self.whole_rows = axis < len(self.inner) - 1

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        """A node that acts on every row alone is asked anew, for the rows that are kept."""
        x = inputs[0]
        behind = len(x.shape) - self.axis
        alone = x.node is not None and x.node.mixes is not None and behind > x.node.mixes
        if not alone or isinstance(self.part, int):
            return super().norms(inputs, saved, at)
        kept = []
        for t in x.inputs:
            axis = len(t.shape) - behind
            varies = axis >= 0 and t.shape[axis] > 1
            kept.append(at.apply(Select(t.shape, axis, self.part), (t,)) if varies else t)
        return at.apply(x.node, tuple(kept))

    def apply(self, x: Tensor) -> Tensor:
        return x[self.index]

    def transpose(self, lam: Tensor) -> Tensor:
        out = lam.new_zeros(lam.shape[0], *self.inner)
        out[self.index] = lam
        return out


class Expand(LinearMap):
    """Copies along new axes and axes of length 1, `copies` of every number: of norm
    sqrt(copies)."""

    def __init__(self, inner: Shape, outer: Shape):
        self.inner = tuple(inner)
        self.outer = tuple(outer)
        self.copies = math.prod(self.outer) / max(1, math.prod(self.inner))
        self.whole_rows = self.inner[-1:] == self.outer[-1:]

    def apply(self, x: Tensor) -> Tensor:
        return aligned(x, len(self.outer)).expand(-1, *self.outer)

    def transpose(self, lam: Tensor) -> Tensor:
        return sum_to(lam, self.inner)


class Sum(LinearMap):
    """scale times the sum over some axes (a mean has scale 1/count): of norm scale sqrt(count)."""

    def __init__(self, inner: Shape, axes: Sequence[int], keepdim: bool, scale: float):
        self.inner = tuple(inner)
        self.axes = tuple(axis + 1 for axis in axes)
        self.keepdim = keepdim
        self.scale = scale
        self.count = math.prod(self.inner[axis] for axis in axes)

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        """A sum of rows is no longer than the longest times their number."""
        known = super().norms(inputs, saved, at)
        if len(self.inner) in self.axes:
            return known
        return replace(known, row=self.scale * self.count * inputs[0].row)

    def apply(self, x: Tensor) -> Tensor:
        return self.scale * x.sum(self.axes, keepdim=self.keepdim)

    def transpose(self, lam: Tensor) -> Tensor:
        if not self.keepdim:
            for axis in sorted(self.axes):
                lam = lam.unsqueeze(axis)
        return (self.scale * lam).expand(-1, *self.inner)


class Mask(LinearMap):
    """x where `keep` is true, a number elsewhere: the second input is a constant boolean array."""

    def __init__(self, shape: Shape, value: float, keep: bool = True):
        self.shape = tuple(shape)
        self.value = value
        self.keep = keep

    def forward(self, *z: Tensor) -> Forward:
        x, mask = z
        kept = aligned(mask if self.keep else ~mask, len(self.shape))
        x = aligned(x, len(self.shape))
        return torch.where(kept, x, self.value), (kept, x.shape[1:])

    def tangent(self, saved: Any, dz: Parts) -> Maybe:
        kept, _ = saved
        return None if dz[0] is None else torch.where(kept, aligned(dz[0], len(self.shape)), 0.0)

    def adjoint(self, saved: Any, lam: Tensor, wanted: Wanted) -> Parts:
        kept, inner = saved
        return sum_to(torch.where(kept, lam, 0.0), inner), None

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        x = inputs[0]
        norm = x.copies(self.shape)
        filled = abs(self.value) * math.sqrt(math.prod(self.shape)) if self.value else 0.0
        full = hypot(norm * x.full, filled)
        return Known(x.jet.linear(norm), moved=norm * x.moved, full=full)


class Patches(LinearMap):
    """Images (n, 1, C, S, S') -> the patches that a convolution reads, (n, 1, places, C k k')."""

    def __init__(self, inner: Shape, kernel: Sequence[int], **options: Any):
        self.inner = tuple(inner)
        self.kernel = tuple(kernel)
        self.options = options

    def apply(self, x: Tensor) -> Tensor:
        return F.unfold(x[:, 0], self.kernel, **self.options).mT[:, None]

    def transpose(self, lam: Tensor) -> Tensor:
        return F.fold(lam[:, 0].mT, self.inner[2:], self.kernel, **self.options)[:, None]


class Lookup(LinearMap):
    """Rows of a table (rows, d) by constant indices; the row `padding` takes no gradient, as in
    torch."""

    def __init__(self, rows: int, padding: int = -1):
        self.rows = rows
        self.padding = padding

    def forward(self, *z: Tensor) -> Forward:
        table, index = z
        return table[0][index], index

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        """The root of how often one row is read is the norm."""
        table, index = inputs
        places = index.value.flatten(1)
        often = (places[:, :, None] == places[:, None]).sum(-1).amax(1)
        norm = often.to(table.jet.a).sqrt()
        jet = table.jet.linear(norm)
        return Known(jet, moved=norm * table.moved, row=table.row, spread=table.spread)

    def tangent(self, saved: Tensor, dz: Parts) -> Maybe:
        table = dz[0]
        if table is None:
            return None
        lead = max(len(table), len(saved))
        flat = saved.flatten(1).expand(lead, -1)
        table = table.expand(lead, -1, -1)
        rows = table.gather(1, flat[..., None].expand(-1, -1, table.shape[-1]))
        return self._padded(rows, flat).reshape(lead, *saved.shape[1:], -1)

    def adjoint(self, saved: Tensor, lam: Tensor, wanted: Wanted) -> Parts:
        flat = saved.flatten(1).expand(len(lam), -1)
        rows = self._padded(lam.reshape(len(lam), flat.shape[1], -1), flat)
        if wanted[0] == 2:
            out = lam.new_zeros(self.rows, lam.shape[-1])
            return out.index_add_(0, flat.flatten(), rows.flatten(0, 1))[None], None
        out = lam.new_zeros(len(lam), self.rows, lam.shape[-1])
        return out.scatter_add_(1, flat[..., None].expand(-1, -1, lam.shape[-1]), rows), None

    def _padded(self, rows: Tensor, flat: Tensor) -> Tensor:
        return rows if self.padding < 0 else rows * (flat != self.padding)[..., None]


class Combination(Flat):
    """sum_k c_k x_k, broadcast to one shape: additions, subtractions, numbers as factors."""

    def __init__(self, shape: Shape, inner: Shapes, factors: Sequence[float]):
        self.shape = tuple(shape)
        self.inner = [tuple(s) for s in inner]
        self.factors = tuple(factors)

    def _sum(self, terms: Parts) -> Maybe:
        total = None
        for factor, term in zip(self.factors, terms, strict=True):
            if term is not None:
                term = aligned(term, len(self.shape))
                total = plus(total, term if factor == 1 else factor * term)
        return None if total is None else total.expand(-1, *self.shape)

    def forward(self, *z: Tensor) -> Forward:
        return self._sum(z), None

    def tangent(self, saved: Any, dz: Parts) -> Maybe:
        return self._sum(dz)

    def adjoint(self, saved: Any, lam: Tensor, wanted: Wanted) -> Parts:
        parts = []
        for factor, inner, want in zip(self.factors, self.inner, wanted, strict=True):
            part = lam if factor == 1 else factor * lam
            parts.append(sum_to(part, inner) if want else None)
        return tuple(parts)

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        """Norms add up; of an operand that is copied along new axes times the root of the
        copies."""
        shape = torch.broadcast_shapes(*(x.shape for x in inputs))
        total = Known(at.still, shape, 0.0, 0.0, 0.0, 0.0, 0.0)
        for factor, x in zip(self.factors, inputs, strict=True):
            c = abs(factor)
            width = c * math.sqrt(_width(shape) / _width(x.shape))
            copies = c * x.copies(shape)
            one_row = x.rows == 1 and math.prod(shape[:-1]) > 1  # the same in every row
            total = Known(
                total.jet + x.jet.linear(copies),
                moved=total.moved + copies * x.moved,
                full=total.full + copies * x.full,
                row=total.row + width * x.row,
                centred=total.centred + (0 if one_row else copies * x.centred),
                spread=total.spread + (0 if one_row else width * x.spread),
            )
        return total


def _width(shape: Shape) -> int:
    return shape[-1] if shape else 1


class Concatenation(Flat):
    """The inputs one after the other along an axis."""

    def __init__(self, axis: int, inner: Shapes):
        self.axis = axis + 1
        self.inner = [tuple(s) for s in inner]

    def forward(self, *z: Tensor) -> Forward:
        lead = max(t.shape[0] for t in z)
        return torch.cat([t.expand(lead, *t.shape[1:]) for t in z], self.axis), None

    def tangent(self, saved: Any, dz: Parts) -> Maybe:
        moving = [t for t in dz if t is not None]
        if not moving:
            return None
        lead = max(t.shape[0] for t in moving)
        pairs = zip(dz, self.inner, strict=True)
        full = [
            moving[0].new_zeros(lead, *s) if t is None else t.expand(lead, *s) for t, s in pairs
        ]
        return torch.cat(full, self.axis)

    def adjoint(self, saved: Any, lam: Tensor, wanted: Wanted) -> Parts:
        return lam.split([shape[self.axis - 1] for shape in self.inner], self.axis)

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        """The parts are orthogonal: their norms add up in squares; the longest row is one of
        theirs."""
        side_by_side = self.axis == len(self.inner[0])
        total = inputs[0]
        for x in inputs[1:]:
            row = hypot(total.row, x.row) if side_by_side else largest(total.row, x.row)
            total = Known(
                total.jet.beside(x.jet),
                moved=hypot(total.moved, x.moved),
                full=hypot(total.full, x.full),
                row=row,
            )
        return replace(total, node=None, inputs=(), group=None, name="", notes={})
