"""Products of two values: matrices head by head, and entry by entry. Source: Lemma 5
(lem:bilinear)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.lemmas import hypot, least, spectral
from utils.calculus.nodes.arrays import aligned, sum_to
from utils.calculus.nodes.base import Form, Maybe, Parts, Roots, Shape, Shapes, Wanted
from utils.calculus.nodes.bilinear import Bilinear, same_group
from utils.calculus.nodes.known import Inputs, Known, Situation
from utils.calculus.nodes.rows import Normalisation


class Matmul(Bilinear):
    """x y over the last two axes, the axes before broadcast: scores Q K^T and mixing A V of
    attention."""

    def __init__(self, shape: Shape, inner: Shapes):
        super().__init__(shape, inner)
        self.rank = max(len(s) for s in self.inner[:2])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return aligned(x, self.rank) @ aligned(y, self.rank)

    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        return sum_to(lam @ aligned(y, self.rank).mT, self.inner[0])

    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        return sum_to(aligned(x, self.rank).mT @ lam, self.inner[1])

    def halves(self, lam: Tensor) -> Form:
        """Head by head; an operand that is broadcast over heads adds their majorants up."""
        U, S, Vh = torch.linalg.svd(lam, full_matrices=False)

        def form(dz: Parts, dout: Maybe) -> Parts:
            x = aligned(dz[0], self.rank)
            y = aligned(dz[1], self.rank)
            x = U @ (S[..., None] * (U.mT @ x))
            y = ((y @ Vh.mT) * S[..., None, :]) @ Vh
            return sum_to(x, self.inner[0]), sum_to(y, self.inner[1])

        return form

    def half_roots(
        self,
        saved: tuple,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
    ) -> Roots:
        """lam = U S V^T head by head: S^(1/2) U^T on the columns of x', S^(1/2) V^T on the rows of
        y'."""
        if shapes[0][:-2] != shapes[1][:-2]:
            return super().half_roots(saved, lam, wanted, shapes)
        U, S, Vh = torch.linalg.svd(lam[0].reshape(-1, *lam.shape[-2:]), full_matrices=False)
        half = S.sqrt()[..., None]
        heads = torch.eye(len(S), dtype=lam.dtype, device=lam.device)
        inside = torch.eye(shapes[0][-1], dtype=lam.dtype, device=lam.device)
        of_x = torch.einsum("gh,grt,jc->grjhtc", heads, half * U.mT, inside)
        of_y = torch.einsum("gh,grc,jt->grjhtc", heads, half * Vh, inside)
        rest = (None,) * (len(wanted) - 2)
        return (
            (of_x.reshape(-1, *shapes[0]), None, *rest),
            (None, of_y.reshape(-1, *shapes[1]), *rest),
        )

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
        """Attention is one map from queries, keys and values; any other product is bilinear."""
        from utils.calculus.nodes.attention import attention  # it knows this class

        known = attention(inputs[0], inputs[1], at)
        if known is not None:
            return known
        x, y = inputs
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        copies = [math.sqrt(math.prod(batch) / math.prod(t.shape[:-2])) for t in inputs]
        of_x, of_x_still = (copies[1] * t for t in _by_heads(x))
        of_y, _ = (copies[0] * t for t in _by_heads(y))
        of_x = at.number("x", of_x)
        of_y = at.number("y", of_y)
        return Known(
            Jet.of([x.jet, y.jet], [of_y, of_x], {(0, 1): min(copies)}),
            moved=least(of_x_still, of_x) * y.moved + of_y * x.moved,
            full=least(of_x * y.full, of_y * x.full),
        )


def _by_heads(t: Known) -> tuple[Tensor, Tensor]:
    """>= the largest norm of the matrices in the last two axes, on the ball and at its centre."""
    still = t.unknown
    if t.value is not None:
        still = spectral(t.value).reshape(len(t.value), -1).amax(1)
    return least(still + t.moved, math.sqrt(t.shape[-2]) * t.row, t.full), still


class Product(Bilinear):
    """x o y + b entry by entry, broadcast to one shape: the gain of a normalisation, a gate, a
    scale."""

    mixes = 0

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        rank = len(self.shape)
        return aligned(x, rank) * aligned(y, rank)

    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        return sum_to(lam * aligned(y, len(self.shape)), self.inner[0])

    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        return sum_to(lam * aligned(x, len(self.shape)), self.inner[1])

    def halves(self, lam: Tensor) -> Form:
        """lam as matrices between the axes that only x has (rows) and those that only y has
        (columns)."""
        rank = len(self.shape)
        padded = [(1,) * (rank - len(s)) + s for s in self.inner[:2]]
        of_x = [i for i in range(rank) if padded[1][i] == 1 and padded[0][i] > 1]
        of_y = [i for i in range(rank) if padded[0][i] == 1 and padded[1][i] > 1]
        shared = [i for i in range(rank) if i not in of_x + of_y]
        order = [0, *(i + 1 for i in (*shared, *of_x, *of_y))]
        back = sorted(range(rank + 1), key=order.__getitem__)

        def matrices(t: Tensor) -> Tensor:
            """(n, shared, rows, columns) of an array that broadcasts to the output's shape."""
            t = aligned(t, rank).permute(order)
            rows = t.shape[1 + len(shared) : 1 + len(shared) + len(of_x)]
            columns = t.shape[1 + len(shared) + len(of_x) :]
            return t.reshape(*t.shape[: 1 + len(shared)], math.prod(rows), math.prod(columns))

        def restored(t: Tensor, k: int) -> Tensor:
            shape = [t.shape[0], *(padded[k][i] for i in (*shared, *of_x, *of_y))]
            return t.reshape(shape).permute(back).reshape(t.shape[0], *self.inner[k])

        U, S, Vh = torch.linalg.svd(matrices(lam), full_matrices=False)

        def form(dz: Parts, dout: Maybe) -> Parts:
            x = U @ (S[..., None] * (U.mT @ matrices(dz[0])))
            y = ((matrices(dz[1]) @ Vh.mT) * S[..., None, :]) @ Vh
            return restored(x, 0), restored(y, 1)

        return form

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
        """A normalisation with its gain is one map; any other product is bilinear."""
        x, y, *bias = inputs
        of_x, of_x_still = _by_copies(x, y)
        of_y, _ = _by_copies(y, x)
        shape = torch.broadcast_shapes(x.shape, y.shape)
        copies = [t.copies(shape) for t in inputs]
        lengths = [b.full * copy for b, copy in zip(bias, copies[2:])]
        sizes = {
            "full": least(y.largest() * copies[0] * x.full, x.largest() * copies[1] * y.full)
            + sum(lengths),
        }
        if y.shape == shape[-1:] and not y.data:
            x, y = y, x  # a gain, and what it multiplies
        if x.shape == shape[-1:] and y.shape == shape:
            sizes["row"] = x.largest() * y.row + sum(b.full for b in bias)
            if all(b.rows == 1 for b in bias):
                sizes |= {"spread": x.largest() * y.spread, "centred": x.largest() * y.centred}
            if isinstance(y.node, Normalisation) and y.node.mixes == 1:
                known = y.node.gained(y.inputs[0], x, bias[0] if bias else None, at)
                return replace(known, **sizes)
        x, y = inputs[:2]
        one_group = same_group(y, bias) and bias[0].shape == y.shape
        if one_group:
            of_x = hypot(of_x, copies[2])
            of_x_still = hypot(of_x_still, copies[2])
        of_x = at.number("x", of_x)
        of_y = at.number("y", of_y)
        jet = Jet.of([x.jet, y.jet], [of_y, of_x], {(0, 1): 1.0})
        moved = least(of_x_still, of_x) * y.moved + of_y * x.moved
        if not one_group:
            jet, moved = self.joint(jet, moved, bias, copies[-1] ** 2)
        return Known(jet, moved=moved, **sizes)


def _by_copies(x: Known, y: Known) -> tuple[Tensor, Tensor]:
    """>= the norm of dy -> x o dy, on the ball and at its centre: the root of the largest sum of
    squares of x over the copies of one entry of y."""
    shape = torch.broadcast_shapes(x.shape, y.shape)
    still = x.unknown
    if x.value is not None:
        squares = aligned(x.value, len(shape)).square().expand(-1, *shape)
        still = sum_to(squares, y.shape)
        still = still.reshape(len(still), -1).amax(1).sqrt()
    copies = x.copies(shape)
    whole = copies * x.full
    largest = y.copies(shape) * x.largest()
    return least(still + copies * x.moved, whole, largest), still
