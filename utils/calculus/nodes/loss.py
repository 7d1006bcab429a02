"""The losses of one example as nodes: logits (n, 1, K) or (n, 1, T, K) -> losses (n,)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils.calculus.lemmas import (
    CROSS_ENTROPY_FIRST,
    CROSS_ENTROPY_SECOND,
    cross_entropy_norms,
    least,
    softmax_moved,
)
from utils.calculus.nodes.arrays import scaled_by
from utils.calculus.nodes.base import Form, Forward, Maybe, Node, Parts, Wanted
from utils.calculus.nodes.known import Inputs, Known, Situation
from utils.networks.losses import IGNORED


class _Loss(Node):
    """What losses share: `saved` begins with the gradient, and D^2 is positive semidefinite."""

    def tangent(self, saved: tuple, dz: Parts) -> Maybe:
        return None if dz[0] is None else (saved[0] * dz[0]).flatten(1).sum(1)

    def adjoint(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Parts:
        return (scaled_by(lam, saved[0]),)

    def majorant(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form | None:
        return self.second_order(saved, lam.abs(), wanted)


class CrossEntropy(_Loss):
    """The mean over an example's tokens of logsumexp(f) - f_y. D = r = p - e_y, D^2 = S = diag(p) -
    p p^T.

    r_y = -sum_{c != y} p_c and S f' = p o (g - p.g) with g = f' - f'_top, top the likeliest class:
    nothing cancels however close to 1 its probability is, be it the label or not. Source: Lemma 2
    (lem:cross-entropy).
    """

    def __init__(self, y: Tensor):
        labels = y.reshape(len(y), -1, 1)
        self.counts = labels != IGNORED
        self.labels = labels.clamp_min(0)

    def forward(self, *z: Tensor) -> Forward:
        f = z[0].reshape(len(z[0]), -1, z[0].shape[-1])
        p = f.softmax(-1)
        weight = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1).to(
            f.dtype
        )  # (n, T, 1)
        r = p.scatter(-1, self.labels, 0.0)
        r.scatter_(-1, self.labels, -r.sum(-1, keepdim=True))
        losses = (weight * (f.logsumexp(-1, keepdim=True) - f.gather(-1, self.labels))).sum((1, 2))
        r = (weight * r).view_as(z[0])
        top = z[0].argmax(-1, keepdim=True)
        return losses, (r, (weight * p).view_as(z[0]), p.view_as(z[0]), top)

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form:
        _, weighted, p, top = saved
        weighted = scaled_by(lam, weighted)

        def form(dz: Parts, dout: Maybe) -> Parts:
            if dz[0] is None:
                return (None,)
            g = dz[0] - torch.take_along_dim(dz[0], top, -1)
            return (weighted * (g - (p * g).sum(-1, keepdim=True)),)

        return form

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
        """|r| <= sqrt(2) and ||S|| <= 1/2 wherever the logits are; near known ones less."""
        f = inputs[0]
        weight = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1).to(f.jet.a)
        weight = weight[..., 0].to(f.jet.a)  # (n, T)
        r = CROSS_ENTROPY_FIRST
        S = CROSS_ENTROPY_SECOND
        if f.value is not None:
            logits = f.value.reshape(len(weight), -1, f.shape[-1])
            r, S = cross_entropy_norms(logits, self.labels[..., 0])
            away = torch.as_tensor(f.moved).to(r).reshape(-1, 1)
            S = softmax_moved(S, away)
            near = least(r + S * away, r * (math.sqrt(2) * away).exp())
            r = near.clamp(max=CROSS_ENTROPY_FIRST)
        r = at.number("r_hat", (weight * r).norm(dim=1))
        S = at.number("S_hat", (weight * S).amax(1))
        return Known(f.jet.smooth(r, S))


class SquaredError(_Loss):
    """The mean of (f - t)^2 over an example's numbers, t the targets or one-hot labels. D^2 =
    2/count."""

    def __init__(self, y: Tensor):
        self.y = y

    def forward(self, *z: Tensor) -> Forward:
        f = z[0]
        if self.y.is_floating_point():
            error = f - self.y.reshape(f.shape)
        else:
            labels = self.y.reshape(*f.shape[:-1], 1)
            error = f.scatter_add(-1, labels, f.new_full(labels.shape, -1.0))
        return error.square().flatten(1).mean(1), (2 / error[0].numel() * error,)

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form:
        curvature = 2 / saved[0][0].numel() * lam

        def form(dz: Parts, dout: Maybe) -> Parts:
            return (None if dz[0] is None else scaled_by(curvature, dz[0]),)

        return form

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
        f = inputs[0]
        count = math.prod(f.shape)
        one_hot = math.sqrt(self.y[0].numel())  # a 1 for each token
        target = self.y.flatten(1).norm(dim=1) if self.y.is_floating_point() else one_hot
        r = 2 / count * (f.full + target)
        if saved is not None:
            r = least(saved[0].flatten(1).norm(dim=1) + 2 / count * f.moved, r)
        r = at.number("r_hat", r)
        return Known(f.jet.smooth(r, at.number("S_hat", 2 / count)))


class BinaryCrossEntropy(_Loss):
    """softplus(f) - y f of one logit. D = sigma(f) - y, D^2 = sigma(f) sigma(-f) <= 1/4.

    With the sign s = 1 - 2y, D = s sigma(s f): nothing cancels for a well-fitted example.
    """

    THIRD = 1 / (6 * math.sqrt(3))  # the largest |D^3|, at sigma = 1/2 +- 1/sqrt 12

    def __init__(self, y: Tensor):
        self.y = y.reshape(-1)
        self.sign = 1 - 2 * self.y

    def forward(self, *z: Tensor) -> Forward:
        sign = self.sign.to(z[0]).reshape(-1, *[1] * (z[0].ndim - 1))
        wrong = torch.sigmoid(sign * z[0])
        losses = torch.nn.functional.softplus(sign * z[0]).flatten(1).sum(1)
        return losses, (sign * wrong, wrong * torch.sigmoid(-sign * z[0]))

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form:
        curvature = scaled_by(lam, saved[1])

        def form(dz: Parts, dout: Maybe) -> Parts:
            return (None if dz[0] is None else curvature * dz[0],)

        return form

    def norms(self, inputs: Inputs, saved: tuple | None, at: Situation) -> Known:
        """|D| <= 1 and D^2 <= 1/4 wherever the logit is; near a known one less."""
        f = inputs[0]
        r = f.jet.a.new_ones(1)
        S = f.jet.a.new_full((1,), 0.25)
        if saved is not None:
            away = torch.as_tensor(f.moved).to(r)
            r = least(saved[0].flatten(1).norm(dim=1) + away / 4, r)
            S = least(saved[1].flatten(1).norm(dim=1) + self.THIRD * away, S)
        return Known(f.jet.smooth(at.number("r_hat", r), at.number("S_hat", S)))


LOSS_NODES: dict[str, Callable[[Tensor], Node]] = {
    "cross_entropy": CrossEntropy,
    "mse": SquaredError,
    "bce": BinaryCrossEntropy,
}
