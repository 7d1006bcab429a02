"""The losses of one example as nodes: logits (n, 1, K) or (n, 1, T, K) -> losses (n,)."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.calculus.nodes.arrays import scaled_by
from utils.calculus.nodes.base import Form, Node, Parts

IGNORED = -100  # the label of a token that does not count, as in torch


class CrossEntropy(Node):
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

    def forward(self, *z: Tensor) -> tuple[Tensor, tuple]:
        f = z[0].reshape(len(z[0]), -1, z[0].shape[-1])
        p = f.softmax(-1)
        weight = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1).to(
            f.dtype
        )  # (n, T, 1)
        r = p.scatter(-1, self.labels, 0.0)
        r.scatter_(-1, self.labels, -r.sum(-1, keepdim=True))
        losses = (weight * (f.logsumexp(-1, keepdim=True) - f.gather(-1, self.labels))).sum((1, 2))
        r = (weight * r).view_as(z[0])
        return losses, (
            r,
            (weight * p).view_as(z[0]),
            p.view_as(z[0]),
            z[0].argmax(-1, keepdim=True),
        )

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
        return None if dz[0] is None else (saved[0] * dz[0]).flatten(1).sum(1)

    def adjoint(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        return (scaled_by(lam, saved[0]),)

    def second_order(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        _, weighted, p, top = saved
        weighted = scaled_by(lam, weighted)

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            if dz[0] is None:
                return (None,)
            g = dz[0] - torch.take_along_dim(dz[0], top, -1)
            return (weighted * (g - (p * g).sum(-1, keepdim=True)),)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        """S is positive semidefinite, and so is |lam| S."""
        return self.second_order(saved, lam.abs(), wanted)


class SquaredError(Node):
    """The mean of (f - t)^2 over an example's numbers, t the targets or one-hot labels. D^2 =
    2/count."""

    def __init__(self, y: Tensor):
        self.y = y

    def forward(self, *z: Tensor) -> tuple[Tensor, tuple]:
        f = z[0]
        if self.y.is_floating_point():
            error = f - self.y.reshape(f.shape)
        else:
            labels = self.y.reshape(*f.shape[:-1], 1)
            error = f.scatter_add(-1, labels, f.new_full(labels.shape, -1.0))
        return error.square().flatten(1).mean(1), (2 / error[0].numel() * error,)

    def tangent(self, saved: tuple, dz: Parts) -> Tensor | None:
        return None if dz[0] is None else (saved[0] * dz[0]).flatten(1).sum(1)

    def adjoint(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        return (scaled_by(lam, saved[0]),)

    def second_order(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        curvature = 2 / saved[0][0].numel() * lam

        def form(dz: Parts, dout: Tensor | None) -> Parts:
            return (None if dz[0] is None else scaled_by(curvature, dz[0]),)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: tuple[int, ...]) -> Form:
        return self.second_order(saved, lam.abs(), wanted)


LOSS_NODES = {"cross_entropy": CrossEntropy, "mse": SquaredError}
