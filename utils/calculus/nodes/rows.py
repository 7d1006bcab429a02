"""Maps of every row alone: softmax, and the normalisations of LayerNorm, RMSNorm and GroupNorm
without their gains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.lemmas import (
    SOFTMAX_FIRST,
    Number,
    gained_norms,
    largest,
    least,
    normalisation_floor,
    normalisation_second,
    softmax_first,
    softmax_moved,
    softmax_second,
)
from utils.calculus.nodes.arrays import absolute, unit
from utils.calculus.nodes.base import (
    Form,
    Forward,
    Leaves,
    Maybe,
    Node,
    Parts,
    Roots,
    Shapes,
    Unknown,
    Wanted,
)
from utils.calculus.nodes.known import Inputs, Known, Situation


def row_roots(form: Form, lam: Tensor, axes: int) -> Roots:
    """The root of a `form` that acts on every row alone, the last `axes` axes: one eigenvalue
    problem a row. lam (1, *shape): any array of the value's shape."""
    d = math.prod(lam.shape[-axes:])
    places = lam.shape[1:-axes]
    units = torch.eye(d, dtype=lam.dtype, device=lam.device).reshape(
        d, *[1] * len(places), *lam.shape[-axes:]
    )
    M = form((units.expand(d, *lam.shape[1:]).contiguous(),), None)[0]
    M = M.reshape(d, -1, d).movedim(0, -1)  # (rows, d, d)
    values, vectors = torch.linalg.eigh((M + M.mT) / 2)
    blocks = values.clamp_min(0).sqrt()[..., None] * vectors.mT
    count = len(blocks)
    spread = blocks.new_zeros(count, d, count, d)
    spread[torch.arange(count), :, torch.arange(count)] = blocks
    return ((spread.reshape(count * d, *lam.shape[1:]),),)


class Softmax(Node):
    """s = softmax(t) along one axis. D = D^T: s o (t' - s.t'). With c = lam - s.lam and s' = D[t']
    the form is s' o c - s (s'.c). Source: Lemma 1 (lem:softmax).
    """

    def __init__(self, axis: int):
        self.axis = axis if axis < 0 else axis + 1

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(self.axis, keepdim=True)

    def forward(self, *z: Tensor) -> Forward:
        s = z[0].softmax(self.axis)
        return s, s

    def tangent(self, saved: Tensor, dz: Parts) -> Maybe:
        return None if dz[0] is None else saved * (dz[0] - self._dot(saved, dz[0]))

    def adjoint(self, saved: Tensor, lam: Tensor, wanted: Wanted) -> Parts:
        return (saved * (lam - self._dot(saved, lam)),)

    def second_order(self, saved: Tensor, lam: Tensor, wanted: Wanted) -> Form:
        c = lam - self._dot(saved, lam)

        def form(dz: Parts, dout: Maybe) -> Parts:
            if dout is None:
                return (None,)
            out = dout * c
            return (out.addcmul_(saved, out.sum(self.axis, keepdim=True), value=-1),)

        return form

    def majorant(self, saved: Tensor, lam: Tensor, wanted: Wanted) -> Form:
        """Row by row the matrix diag(s o c) - s (s o c)^T - (s o c) s^T, by its eigenvectors."""
        s = saved.movedim(self.axis, -1)
        sc = (saved * (lam - self._dot(saved, lam))).movedim(self.axis, -1)
        cross = s[..., :, None] * sc[..., None, :]
        M = absolute(torch.diag_embed(sc) - cross - cross.mT)

        def form(dz: Parts, dout: Maybe) -> Parts:
            if dz[0] is None:
                return (None,)
            rows = dz[0].movedim(self.axis, -1)
            return ((M @ rows[..., None])[..., 0].movedim(-1, self.axis),)

        return form

    def roots(
        self,
        saved: Tensor,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
        leaves: Leaves,
    ) -> Roots:
        form = self.majorant(saved, lam, wanted)
        if self.axis % lam.ndim == lam.ndim - 1:
            return row_roots(form, lam, 1)
        return super().roots(saved, lam, wanted, shapes, leaves)

    def norms(self, inputs: Inputs, saved: Tensor | None, at: Situation) -> Known:
        t = inputs[0]
        axis = self.axis + len(t.shape) if self.axis < 0 else self.axis - 1
        length = t.shape[axis]
        rows = math.prod(t.shape) // length
        first: Number = SOFTMAX_FIRST
        notes = {}
        if saved is not None:
            notes["first"] = softmax_first(saved.movedim(self.axis, -1)).flatten(1).amax(1)
            first = softmax_moved(notes["first"], torch.as_tensor(t.moved))
        first = at.number("softmax1", first)
        second = at.number("softmax2", softmax_second(first))
        return Known(
            t.jet.smooth(first, second),
            moved=least(first * t.moved, math.sqrt(2 * rows)),
            full=math.sqrt(rows),
            row=1.0 if axis == len(t.shape) - 1 else math.inf,
            notes=notes,
        )


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
        self.mixes = axes

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(self.axes, keepdim=True) if self.centred else x

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean over a row of a o b: their inner product over d."""
        return (a * b).mean(self.axes, keepdim=True)

    def _derivative(self, saved: tuple, t: Tensor) -> Tensor:
        n, scale = saved
        return scale * (self._centre(t)).addcmul(n, self._dot(n, t), value=-1)

    def forward(self, *z: Tensor) -> Forward:
        x = self._centre(z[0])
        scale = (self._dot(x, x) + self.eps).rsqrt()  # 1/rho
        n = x * scale
        return n, (n, scale)

    def tangent(self, saved: tuple, dz: Parts) -> Maybe:
        return None if dz[0] is None else self._derivative(saved, dz[0])

    def adjoint(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Parts:
        return (self._derivative(saved, lam),)

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form:
        n, scale = saved
        factor = -scale.square()
        along = factor * self._dot(n, lam)
        m = factor * self._centre(lam)
        skew = m - 3 * along * n  # the form is  m (n.x') + n (skew.x') + along P x'

        def form(dz: Parts, dout: Maybe) -> Parts:
            x = dz[0]
            if x is None:
                return (None,)
            out = along * self._centre(x)
            out.addcmul_(m, self._dot(n, x))
            return (out.addcmul_(n, self._dot(skew, x)),)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form:
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

        def majorant(dz: Parts, dout: Maybe) -> Parts:
            if dz[0] is None:
                return (None,)
            x = dz[0].flatten(-len(self.axes))
            inside = E @ x[..., None]  # (n, ..., 2, 1)
            outside = rows._centre(x) - (E.mT @ inside)[..., 0]
            out = a * outside + (E.mT @ (T @ inside))[..., 0]
            return (out.reshape(len(out), *shape[1:]),)

        return majorant

    def roots(
        self,
        saved: tuple,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
        leaves: Leaves,
    ) -> Roots:
        return row_roots(self.majorant(saved, lam, wanted), lam, len(self.axes))

    def _on_ball(self, x: Known, at: Situation) -> tuple[Tensor, Tensor, Tensor]:
        """A lower bound of rho, a bound of ||D^2 n||, and the displacement of n.

        The standard deviation of a row is 1/sqrt(d)-Lipschitz, so that rho and the largest
        ||D^2 n|| on the ball are known exactly. Source: Corollary (cor:ball), part (ii).
        """
        d = self._width(x)
        limit = 2 * math.sqrt(math.prod(x.shape))
        rho, bend = normalisation_floor(self.eps, at.floor)
        bend = bend / math.sqrt(d)
        if x.value is None:
            if rho == 0:
                raise Unknown(
                    "A LayerNorm has eps = 0, so no bound holds for every input: "
                    "give variance_floor."
                )
            one = x.jet.a.new_ones(1)
            return rho * one, bend * one, least(x.moved / rho, limit * one)
        deviation = self._rows(x).square().mean(-1).sqrt()
        step = (torch.as_tensor(x.moved).reshape(-1, 1) / math.sqrt(d)).to(deviation)
        low = (deviation - step).clamp(min=0).square()
        high = (deviation + step).square()
        rho = largest((low + self.eps).sqrt().amin(-1), rho)
        worst = largest(low, self.eps / 4)  # where it is largest, near eps/4
        worst = torch.minimum(worst, high)
        second = normalisation_second(worst, self.eps).nan_to_num(nan=math.inf).amax(-1)
        return rho, least(second / math.sqrt(d), bend), least(x.moved / rho, limit)

    def _rows(self, x: Known) -> Tensor:
        """The rows at the centre (n, N, d), their means taken off."""
        return self._centre(x.value).reshape(len(x.value), -1, self._width(x))

    def _width(self, x: Known) -> int:
        """How many numbers a row has."""
        return math.prod(x.shape[-len(self.axes) :])

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
        x = inputs[0]
        rho, bend, turned = self._on_ball(x, at)
        jet = x.jet.smooth(at.number("slope", 1 / rho), at.number("bend", bend))
        length = math.sqrt(math.prod(x.shape))
        return Known(jet, moved=turned, full=length, row=math.sqrt(self._width(x)))

    def gained(self, x: Known, gamma: Known, beta: Known | None, at: Situation) -> Known:
        """What is known of gamma n(x) + beta as one map: diag(gamma) Dn has a smaller norm than its
        factors. The gain has the shape of a row; the sizes are left to `Product`; `at` as in
        `Node.norms`.

        Source: Lemma 3 (lem:layernorm), Corollary (cor:ball), part (ii).
        """
        rho, bend, turned = self._on_ball(x, at)
        gain = gamma.value[0].flatten()
        rows = math.prod(x.shape) // len(gain)
        Gamma = gain.abs().max() + gamma.moved
        norms = {"first": Gamma / rho, "own": math.sqrt(math.prod(x.shape)), "mixed": 1 / rho}
        own = norms["own"]
        if x.value is not None:
            point = gained_norms(self._rows(x), gain, self.eps, self.centred)
            own = point["own"]
            still = torch.as_tensor(x.moved) == 0
            drift = torch.where(still, 0.0, bend * x.moved)  # of Dn
            first = point["first"] + gamma.moved / rho + gain.abs().max() * drift
            norms = {
                "first": least(first, norms["first"]),
                "own": least(own + turned, norms["own"]),
                "mixed": least(point["mixed"] + drift, norms["mixed"]),
            }
        norms["second"] = Gamma * bend
        norms = {name: at.number(name, value) for name, value in norms.items()}
        second = {(0, 0): norms["second"], (0, 1): norms["mixed"]}
        jet = Jet.of([x.jet, gamma.jet], [norms["first"], norms["own"]], second)
        moved = least(norms["first"] * x.moved, Gamma * turned)
        moved = moved + least(own, norms["own"]) * gamma.moved
        apart = beta is not None and beta.name != gamma.name and beta.group == gamma.group
        if beta is not None and (beta.group is None or not apart):
            jet = jet + beta.jet.linear(math.sqrt(rows))
            moved = moved + math.sqrt(rows) * beta.moved
        return Known(jet, moved=moved)
