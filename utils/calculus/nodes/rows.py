"""Maps of every row alone: softmax, and the normalisations of LayerNorm, RMSNorm and GroupNorm
without their gains."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.calculus.nodes.arrays import absolute, unit
from utils.calculus.nodes.base import Form, Node, Parts


class Softmax(Node):
    """s = softmax(t) along one axis. D = D^T: s o (t' - s.t'). With c = lam - s.lam and s' = D[t']
    the form is s' o c - s (s'.c). Source: Lemma 1 (lem:softmax).
    """

    def __init__(self, axis: int):
        self.axis = axis if axis < 0 else axis + 1

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(self.axis, keepdim=True)

    def forward(self, *z: Tensor) -> tuple[Tensor, Tensor]:
        s = z[0].softmax(self.axis)
        return s, s

    def tangent(self, saved: Tensor, dz: Parts) -> Tensor | None:
        return None if dz[0] is None else saved * (dz[0] - self._dot(saved, dz[0]))

    def adjoint(self, saved: Tensor, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        return (saved * (lam - self._dot(saved, lam)),)

    def second_order(self, saved: Tensor, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        c = lam - self._dot(saved, lam)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            if dout is None:
                return (None,)
            out = dout * c
            return (out.addcmul_(saved, out.sum(self.axis, keepdim=True), value=-1),)

        return form

    def majorant(self, saved: Tensor, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        """Row by row the matrix diag(s o c) - s (s o c)^T - (s o c) s^T, by its eigenvectors."""
        s = saved.movedim(self.axis, -1)
        sc = (saved * (lam - self._dot(saved, lam))).movedim(self.axis, -1)
        cross = s[..., :, None] * sc[..., None, :]
        M = absolute(torch.diag_embed(sc) - cross - cross.mT)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            if dz[0] is None:
                return (None,)
            rows = dz[0].movedim(self.axis, -1)
            return ((M @ rows[..., None])[..., 0].movedim(-1, self.axis),)

        return form


class Normalisation(Node):
    """n = P x / rho in every row, rho^2 = mean (P x)^2 + eps; P takes off the mean (LayerNorm) or
    nothing (RMSNorm).

    A row is what the last `axes` axes hold, d numbers. D = D^T: (P x' - n (n.x')/d) / rho. With m =
    P lam the form is -(1/(d rho^2)) [m (n.x') + n (m.x') + (n.lam) P x' - (3/d) (n.lam)(n.x') n].
    Source: Lemma 3 (lem:layernorm).
    """

    def __init__(self, eps: float, axes: int = 1, centred: bool = True):
        self.eps = eps
        self.axes = tuple(range(-axes, 0))
        self.centred = centred

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(self.axes, keepdim=True) if self.centred else x

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean over a row of a o b: their inner product over d."""
        return (a * b).mean(self.axes, keepdim=True)

    def _derivative(self, saved: tuple, t: Tensor) -> Tensor:
        n, scale = saved
        return scale * (self._centre(t)).addcmul(n, self._dot(n, t), value=-1)

    def forward(self, *z: Tensor) -> tuple[Tensor, tuple]:
        x = self._centre(z[0])
        scale = (self._dot(x, x) + self.eps).rsqrt()  # 1/rho
        n = x * scale
        return n, (n, scale)

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
        return None if dz[0] is None else self._derivative(saved, dz[0])

    def adjoint(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        return (self._derivative(saved, lam),)

    def second_order(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        n, scale = saved
        factor = -scale.square()
        along = factor * self._dot(n, lam)
        m = factor * self._centre(lam)
        skew = m - 3 * along * n  # the form is  m (n.x') + n (skew.x') + along P x'

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            x = dz[0]
            if x is None:
                return (None,)
            out = along * self._centre(x)
            out.addcmul_(m, self._dot(n, x))
            return (out.addcmul_(n, self._dot(skew, x)),)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        """M is a P outside the plane of n and m and symmetric inside it: |a| P there, a 2 x 2
        eigenproblem here."""
        shape = saved[0].shape
        n, scale = (t.flatten(-len(self.axes)) for t in saved)
        lam = lam.flatten(-len(self.axes))
        rows = Normalisation(self.eps, 1, self.centred)
        a = (scale.square() * rows._dot(n, lam)).abs()
        first = unit(n, -1)
        rest = rows._centre(lam)
        for _ in range(2):
            rest = rest - first * (first * rest).sum(-1, keepdim=True)
        second = unit(rest, -1)
        form = rows.second_order((n, scale), lam, wanted)
        E = torch.stack([first, second], -2)  # (n, ..., 2, d)
        ME = torch.stack([form((e,), None)[0] for e in (first, second)], -2)
        T = absolute((E @ ME.mT + ME @ E.mT) / 2)

        def majorant(dz: Parts, dout: Tensor | None) -> Parts:
            if dz[0] is None:
                return (None,)
            x = dz[0].flatten(-len(self.axes))
            inside = E @ x[..., None]  # (n, ..., 2, 1)
            outside = rows._centre(x) - (E.mT @ inside)[..., 0]
            out = a * outside + (E.mT @ (T @ inside))[..., 0]
            return (out.reshape(len(out), *shape[1:]),)

        return majorant
