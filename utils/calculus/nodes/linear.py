"""Linear maps of every row by a matrix that may move: x W^T + b. Source: Lemma 5 (lem:bilinear)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.lemmas import hypot, least, spectral, through
from utils.calculus.nodes.arrays import aligned
from utils.calculus.nodes.base import Form, Forward, Maybe, Parts, Shape, Shapes, Wanted
from utils.calculus.nodes.bilinear import Bilinear, same_group
from utils.calculus.nodes.known import Inputs, Known, Situation


class Linear(Bilinear):
    """x W^T + b on every token: x (..., in), W (out, in) or, `turned`, (in, out), b (out,) -> (...,
    out)."""

    def __init__(self, shape: Shape, inner: Shapes, turned: bool = False):
        super().__init__(shape, inner)
        self.turned = turned

    def forward(self, *z: Tensor) -> Forward:
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

    def tangent(self, saved: tuple, dz: Parts) -> Maybe:
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

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form | None:
        if not (wanted[0] and wanted[1]):
            return None
        return LinearForm(self, saved, lam, wanted)

    def halves(self, lam: Tensor) -> Form:
        U, S, Vh = torch.linalg.svd(lam.flatten(1, -2), full_matrices=False)  # tokens by outputs
        S = S[..., None]

        def form(dz: Parts, dout: Maybe) -> Parts:
            x = dz[0].flatten(1, -2)
            W = dz[1].mT if self.turned else dz[1]
            x = (U @ (S * (U.mT @ x))).reshape(dz[0].shape)
            W = Vh.mT @ (S * (Vh @ W))
            return x, W.mT if self.turned else W

        return form

    def coupling(self, lam: Tensor, place: int, shapes: Shapes) -> Tensor:
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

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
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
        between = between + W.moved * first + W_1.moved * weight
        between = at.number("W_21", between)
        slope = through(between, weight * first, x.notes["act1"], slopes.low, slopes.high)
        rest = source.jet.smooth(slope, weight * x.notes["act2"] * first**2)
        own = {g for known in (W, W_1, *bias, *bias_1) for g in known.jet.movers}
        return jet.least(rest, sorted(own))


class LinearForm:
    """The second-order form (lam W', lam^T X', 0) of a linear layer.

    Its parts in the weights are the largest arrays of a walk: `after` adds them to D phi^T mu in
    the same pass.
    """

    def __init__(self, node: Linear, saved: tuple, lam: Tensor, wanted: Wanted):
        self.node = node
        self.saved = saved
        self.lam = lam
        self.wanted = wanted
        self.rows = lam.flatten(1, -2)

    def __call__(self, dz: Parts, dout: Maybe) -> Parts:
        x = None if dz[1] is None else self.node.left(self.lam, dz[1])
        y = None if dz[0] is None else self.node.right(self.lam, dz[0], self.wanted[1] == 2)
        return (x, y, *(None,) * (len(self.wanted) - 2))

    def after(self, mu: Tensor, dz: Parts) -> Parts | None:
        """D phi^T mu and the form of dz together; None where they do not have the same rows."""
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
