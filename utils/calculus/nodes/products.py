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
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.lemmas import hypot, least, spectral, through
from utils.calculus.nodes.arrays import aligned, plus, sum_to
from utils.calculus.nodes.base import Form, Node, Parts, Roots
from utils.calculus.nodes.known import Known, Situation
from utils.calculus.nodes.rows import Normalisation

Shapes = Sequence[Sequence[int]]


class Bilinear(Node):
    """phi(x, y), or phi(x, y) + b. Subclasses give `product`, `left`, `right` and `halves`."""

    couples = True

    def __init__(self, shape: Sequence[int], inner: Shapes):
        self.shape = tuple(shape)
        self.inner = [tuple(s) for s in inner]

    @abstractmethod
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """phi(x, y)."""

    @abstractmethod
    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        """The adjoint of x -> phi(x, y)."""

    @abstractmethod
    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        """The adjoint of y -> phi(x, y)."""

    @abstractmethod
    def halves(self, lam: Tensor) -> Form:
        """The map (dz, dout) -> (U S U^T x', V S V^T y')."""

    def forward(self, *z: Tensor) -> tuple[Tensor, object]:
        out = self.product(z[0], z[1])
        if len(z) == 3:
            out = out + aligned(z[2], len(self.shape))
        return out, (z[0], z[1])

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
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

    def adjoint(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        x, y = saved
        parts = [None] * len(wanted)
        if wanted[0]:
            parts[0] = self.left(lam, y)
        if wanted[1]:
            parts[1] = self.right(lam, x, wanted[1] == 2)
        if len(wanted) == 3 and wanted[2]:
            parts[2] = sum_to(lam, self.inner[2])
        return tuple(parts)

    def second_order(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        rest = (None,) * (len(wanted) - 2)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = None if dz[1] is None else self.left(lam, dz[1])
            y = None if dz[0] is None else self.right(lam, dz[0], wanted[1] == 2)
            return (x, y, *rest)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        halves = self.halves(lam)
        rest = (None,) * (len(wanted) - 2)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            if dz[0] is None or dz[1] is None:  # what does not move is coupled with nothing
                return (None,) * len(wanted)
            return (*halves(dz, dout), *rest)

        return form

    def roots(
        self,
        saved: tuple,
        lam: Tensor,
        wanted: tuple[int, ...],
        shapes: Sequence[tuple[int, ...]],
        leaves: tuple[bool, ...],
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

    def coupling(self, lam: Tensor, place: int, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Rows R with |R x'| = |the gradient in the other input of < lam, phi(x', .) >|, x' at
        `place`."""
        other = shapes[1 - place]
        units = torch.eye(math.prod(other), dtype=lam.dtype, device=lam.device)
        units = units.reshape(-1, *other)
        return self.left(lam, units) if place == 0 else self.right(lam, units)

    def half_roots(
        self,
        saved: tuple,
        lam: Tensor,
        wanted: tuple[int, ...],
        shapes: Sequence[tuple[int, ...]],
    ) -> Roots:
        """Roots of the two halves of `halves`."""
        none = (False,) * len(wanted)
        return Node.roots(self, saved, lam, wanted, shapes, none)

    def joint(self, jet: Jet, moved: Tensor, bias: Sequence[Known], rows: int) -> tuple:
        """Jet and displacement with a bias of another group than the second input's, copied to
        `rows` rows."""
        for b in bias:
            jet = jet + b.jet.linear(math.sqrt(rows))
            moved = moved + math.sqrt(rows) * b.moved
        return jet, moved


def same_group(y: Known, bias: Sequence[Known]) -> bool:
    """Whether a bias belongs to the group of weights of the second input."""
    return bool(bias) and y.group is not None and y.group == bias[0].group


class Linear(Bilinear):
    """x W^T + b on every token: x (..., in), W (out, in) or, `turned`, (in, out), b (out,) -> (...,
    out)."""

    def __init__(self, shape: Sequence[int], inner: Shapes, turned: bool = False):
        super().__init__(shape, inner)
        self.turned = turned

    def forward(self, *z: Tensor) -> tuple[Tensor, object]:
        x, W, *bias = z
        if W.shape[0] > 1 or (bias and bias[0].shape[0] > 1):
            return super().forward(*z)
        W = W[0].mT if self.turned else W[0]
        return F.linear(x, W, bias[0][0].reshape(-1) if bias else None), (x, z[1])

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        W = y if self.turned else y.mT
        if W.shape[0] == 1:
            return x @ W[0]
        return (x.flatten(1, -2) @ W).reshape(len(W), *self.shape)

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
        x = saved[0]
        if dz[0] is None or dz[1] is None or len(dz[1]) == 1 or len(x) == 1:
            return super().tangent(saved, dz)
        moved = self.product(dz[0], saved[1]).flatten(1, -2)  # one pass adds X W'^T to X' W^T
        out = torch.baddbmm(moved, x.flatten(1, -2), dz[1] if self.turned else dz[1].mT)
        out = out.reshape(len(out), *self.shape)
        if len(dz) == 3 and dz[2] is not None:
            out = out.add_(aligned(dz[2], len(self.shape)))
        return out

    def left(self, lam: Tensor, y: Tensor) -> Tensor:
        W = y.mT if self.turned else y
        if W.shape[0] == 1:
            return lam @ W[0]
        return (lam.flatten(1, -2) @ W).reshape(len(W), *self.inner[0])

    def right(self, lam: Tensor, x: Tensor, summed: bool = False) -> Tensor:
        x = x.flatten(1, -2)
        lam = lam.flatten(1, -2)
        if summed and len(x) == len(lam):
            x = x.flatten(0, 1)[None]
            lam = lam.flatten(0, 1)[None]
        return x.mT @ lam if self.turned else lam.mT @ x

    def second_order(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        return LinearForm(self, saved, lam, wanted)

    def halves(self, lam: Tensor) -> Form:
        U, S, Vh = torch.linalg.svd(lam.flatten(1, -2), full_matrices=False)  # tokens by outputs
        S = S[..., None]

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = dz[0].flatten(1, -2)
            W = dz[1].mT if self.turned else dz[1]
            x = (U @ (S * (U.mT @ x))).reshape(dz[0].shape)
            W = Vh.mT @ (S * (Vh @ W))
            return x, W.mT if self.turned else W

        return form

    def coupling(self, lam: Tensor, place: int, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """lam^T X' for the rows X', without the rotation on its left."""
        if place == 1:
            return super().coupling(lam, place, shapes)
        _, S, Vh = torch.linalg.svd(lam.flatten(1, -2)[0].mT, full_matrices=False)
        width = shapes[0][-1]
        eye = torch.eye(width, dtype=lam.dtype, device=lam.device)
        rows = torch.einsum("rt,jc->rjtc", S[:, None] * Vh, eye)
        return rows.reshape(-1, *shapes[0])

    def matrix(self, W: Known) -> Tensor:
        """W (L, out, in) at the centre."""
        return W.value.mT if self.turned else W.value

    def norms(self, inputs: tuple[Known, ...], saved: tuple | None, at: Situation) -> Known:
        """[W b] of one module is one group of weights and acts on [X 1]."""
        x, W, *bias = inputs
        one_group = same_group(W, bias)
        weight = at.number("W", W.norm())
        reads = at.number("X1", x.norm(ones=one_group))
        jet = x.jet.times(W.jet, reads, weight)
        moved = least(x.at_centre(one_group), reads) * W.moved + weight * x.moved
        sizes = {"centred": weight * x.centred, "spread": weight * x.spread}
        if one_group:
            both = torch.cat([self.matrix(W), bias[0].value.reshape(1, -1, 1)], 2)
            omega = spectral(both) + W.moved
            sizes["full"] = omega * hypot(x.full, math.sqrt(x.rows))
            sizes["row"] = omega * hypot(x.row, 1.0)
        else:
            jet, moved = self.joint(jet, moved, bias, x.rows)
            length = bias[0].full if bias else 0.0
            sizes["full"] = weight * x.full + math.sqrt(x.rows) * length
            sizes["row"] = weight * x.row + length
        if "slopes" in x.notes and type(x.inputs[0].node) is Linear:
            jet = self._past_function(jet, x, W, bias, weight, at)
        return Known(jet, moved=moved, **sizes)

    def _past_function(
        self, jet: Jet, x: Known, W: Known, bias: list[Known], weight: Tensor, at: Situation
    ) -> Jet:
        """W_2 f(X W_1^T) with both maps at rest: ||W_2 diag(f') W_1|| may be far below its factors.

        Source: Lemma 4 (lem:activations), Lemma 5 (lem:bilinear).
        """
        before = x.inputs[0]
        source, W_1, *bias_1 = before.inputs
        slopes = x.notes["slopes"]
        if not math.isfinite(slopes.first) or W.value is None or W_1.value is None:
            return jet
        first = W_1.norm()
        between = spectral(self.matrix(W) @ before.node.matrix(W_1))
        between = between + W.moved * weight + W_1.moved * first
        between = at.number("W_21", between)
        slope = through(between, weight * first, x.notes["act1"], slopes.low, slopes.high)
        rest = source.jet.smooth(slope, weight * x.notes["act2"] * first**2)
        own = sum(known.jet.a.sum(0) for known in (W, W_1, *bias, *bias_1))
        return jet.least(rest, own.nonzero()[:, 0].tolist())


class LinearForm:
    """The second-order form (lam W', lam^T X', 0) of a linear layer.

    Its parts in the weights are the largest arrays of a walk: `after` adds them to D phi^T mu in
    the same pass.
    """

    def __init__(self, node: Linear, saved: tuple, lam: Tensor, wanted: tuple[int, ...]):
        self.node = node
        self.saved = saved
        self.lam = lam
        self.wanted = wanted
        self.rows = lam.flatten(1, -2)

    def __call__(self, dz: Parts, dout: Tensor | None) -> Parts:
        x = None if dz[1] is None else self.node.left(self.lam, dz[1])
        y = None if dz[0] is None else self.node.right(self.lam, dz[0], self.wanted[1] == 2)
        return (x, y, *(None,) * (len(self.wanted) - 2))

    def after(self, mu: Tensor, dz: Parts) -> Parts | None:
        """D phi^T mu and the form together; None where they do not have the same rows."""
        alike = all(t is not None and len(t) == len(mu) == len(self.lam) for t in dz[:2])
        if not alike or self.wanted[1] == 2 or len(mu) == 1:
            return None
        turned = self.node.turned
        parts = list(self.node.adjoint(self.saved, mu, self.wanted))
        moved = dz[1].mT if turned else dz[1]
        x = torch.baddbmm(parts[0].flatten(1, -2), self.rows, moved)
        parts[0] = x.reshape(len(x), *self.node.inner[0])
        x = dz[0].flatten(1, -2)
        a, b = (x.mT, self.rows) if turned else (self.rows.mT, x)
        parts[1].baddbmm_(a, b)  # the adjoint's own array
        return tuple(parts)


class Matmul(Bilinear):
    """x y over the last two axes, the axes before broadcast: scores Q K^T and mixing A V of
    attention."""

    def __init__(self, shape: Sequence[int], inner: Shapes):
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

        def form(dz: Parts, dout: Tensor | None) -> Parts:
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
        wanted: tuple[int, ...],
        shapes: Sequence[tuple[int, ...]],
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

    def norms(self, inputs: tuple[Known, ...], saved: tuple | None, at: Situation) -> Known:
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
    still = t.jet.a.new_full((1,), math.inf)
    if t.value is not None:
        still = spectral(t.value).flatten(1).amax(1)
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

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = U @ (S[..., None] * (U.mT @ matrices(dz[0])))
            y = ((matrices(dz[1]) @ Vh.mT) * S[..., None, :]) @ Vh
            return restored(x, 0), restored(y, 1)

        return form

    def norms(self, inputs: tuple[Known, ...], saved: tuple | None, at: Situation) -> Known:
        """A normalisation with its gain is one map; any other product is bilinear."""
        x, y, *bias = inputs
        of_x, of_x_still = _by_copies(x, y)
        of_y, _ = _by_copies(y, x)
        shape = torch.broadcast_shapes(x.shape, y.shape)
        copies = [math.sqrt(math.prod(shape) / max(1, math.prod(t.shape))) for t in inputs]
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
    still = x.jet.a.new_full((1,), math.inf)
    if x.value is not None:
        squares = aligned(x.value, len(shape)).square().expand(-1, *shape)
        still = sum_to(squares, y.shape).flatten(1).amax(1).sqrt()
    copies = math.sqrt(math.prod(shape) / max(1, math.prod(x.shape)))
    whole = copies * x.full
    largest = math.sqrt(math.prod(shape) / max(1, math.prod(y.shape))) * x.largest()
    return least(still + copies * x.moved, whole, largest), still
