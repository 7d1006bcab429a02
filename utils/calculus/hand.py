"""The second-order calculus of a transformer: every kind of node with its own first and second derivative.

A network is a list of steps z = phi(inputs), phi one of the nodes below; parameters are inputs like any other. Along
a tangent u of the weights the values move by z' (one walk forward), the adjoints lam_z = dl/dz of the loss by mu_z
(one walk back):

    z'         =  sum over inputs x   D_x phi [x']
    lam_x      =  sum over readers z  D_x phi^T lam_z
    mu_x       =  sum over readers z  D_x phi^T mu_z  +  < lam_z, D^2 phi [(inputs)', .] >_x

and mu at the weights is h u, the Hessian of the loss times u. Values and adjoints do not depend on u: `Tape` computes
them once, and each product costs one walk, about two gradients. Source: Theorem (thm:adjoint), whose bilinear form
u^T h v this is the gradient of.

Every array has the samples first: activations (n, N, d) with N tokens, attention (n, H, N_q, N), logits (n, 1, K),
losses (n,). A parameter has its own shape; its tangent has too (one direction for all samples) or has the samples in
front (n, ...). All nodes act on each sample alone. Tangents and adjoints that are zero may be None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils import models
from utils.models import ACTIVATIONS, MLP, Attention, Block, MultilayerPerceptron, ViT, ViTConfig

# --- nodes ------------------------------------------------------------------------------------------
# forward(*inputs)           -> (phi(inputs), saved): `saved` is what the other three need
# tangent(saved, dz)         -> D phi [dz], dz a tuple with a tangent (or None) for each input
# adjoint(saved, lam)        -> D phi^T lam, a tuple with a part for each input; parameters get one row a sample
# second_order(saved, lam)   -> the map (dz, dout) -> < lam, D^2 phi [dz, .] >, a tuple again, where dout = D phi [dz]
#                               has been computed anyway; None in place of the method where phi is linear
# majorant(saved, lam)       -> the map (dz, dout) -> |M| dz of the positive semidefinite |M| with -|M| <= M <= |M|, M
#                               the symmetric matrix of < lam, D^2 phi >; for a bilinear phi the two halves of
#                               2 <x, C y> <= <x, |C^T| x> + <y, |C| y>. Source: Theorem (thm:majorant)
# ridge(saved, lam)          -> of the nodes whose second input is a parameter: the map (dz, dout) -> R^T R dx, where
#                               R x' is the gradient in the parameter of < lam, D^2 phi [x', .] >, so that the coupling
#                               is 2 <W', R x'> <= |R x'|^2 / mu + mu |W'|^2. Source: Theorem (thm:deflation)
# A node whose adjoint has a parameter's part takes sums=True: the parts are summed over the samples then.


class Linear:
    """Z = X W^T + b on every token: X (n, N, in), W (out, in), b (out,) or absent -> (n, N, out).

    D: X' W^T + X W'^T + b'.  D^T lam: (lam W, lam^T X, sum_t lam_t).  D^2: <lam, X' W'^T> twice, so (lam W', lam^T X').
    Source: Lemma 5 (lem:bilinear).
    """

    def forward(self, X, W, b=None):
        # one matrix product over all tokens of all samples
        Z = torch.nn.functional.linear(X, W, b)
        return Z, (X, W, b is not None)

    def tangent(self, saved, dz):
        (X, W, _), (dX, dW, *db) = saved, dz
        Z = None if dX is None else dX @ W.mT
        if dW is not None:
            Z = X @ dW.mT if Z is None else torch.baddbmm(Z, X, dW.mT) if dW.ndim == 3 else Z + X @ dW.mT
        if db and db[0] is not None:
            moved = db[0][..., None, :]
            Z = moved.expand(len(X), X.shape[1], -1) if Z is None else Z + moved
        return Z

    def adjoint(self, saved, lam, sums=False, wanted=(True, True, True), into=None):
        X, W, bias = saved
        dX = lam @ W if wanted[0] else None
        dW = _outer(lam, X, sums, into) if wanted[1] else None
        return (dX, dW, lam.sum((0, 1) if sums else 1) if wanted[2] else None) if bias else (dX, dW)

    def second_order(self, saved, lam, sums=False, wanted=(True, True, True)):
        bias = saved[2]

        def form(dz, dout, into=None):
            dX, dW = dz[:2]
            out = (
                None if dW is None or not wanted[0] else lam @ dW,
                None if dX is None or not wanted[1] else _outer(lam, dX, sums, into),
            )
            return (*out, None) if bias else out

        return form

    def majorant(self, saved, lam):
        """C maps W' to lam W': U S U^T on X' (tokens), V S V^T on W' (outputs), lam = U S V^T."""
        bias = saved[2]
        U, S, Vh = torch.linalg.svd(lam, full_matrices=False)

        def form(dz, dout):
            out = U @ (S[..., None] * (U.mT @ dz[0])), Vh.mT @ (S[..., None] * (Vh @ dz[1]))
            return (*out, None) if bias else out

        return form

    def ridge(self, saved, lam):
        """R X' = lam^T X', so lam (lam^T X')."""
        return lambda dz, dout: (None if dz[0] is None else lam @ (lam.mT @ dz[0]), None, None)


def _outer(lam, X, sums, into=None):
    """sum over tokens lam_t X_t^T: (n, out, in), or summed over the samples too (out, in).

    Into a `Target` it is added in place, and None is returned: these are the largest arrays of a walk.
    """
    if into is not None and not sums:
        into.value.baddbmm_(lam.mT, X, beta=float(into.filled))
        into.filled = True
        return None
    return lam.flatten(0, 1).mT @ X.flatten(0, 1) if sums else lam.mT @ X


class Add:
    """Z = X + Y, same shapes. Linear: D^T lam = (lam, lam)."""

    def forward(self, X, Y):
        return X + Y, ()

    def tangent(self, saved, dz):
        dX, dY = dz
        return dX if dY is None else dY if dX is None else dX + dY

    def adjoint(self, saved, lam):
        return lam, lam

    second_order = None


class Score:
    """T_h = Q_h K_h^T / sqrt(d_h): Q (n, N_q, d), K (n, N, d) -> (n, H, N_q, N). Heads are column blocks of width d_h.

    D^T lam: (lam K, lam^T Q)/sqrt(d_h).  D^2: (lam K', lam^T Q')/sqrt(d_h). Source: Lemma 5 (lem:bilinear).
    """

    def __init__(self, n_heads: int):
        self.H = n_heads

    def forward(self, Q, K):
        Q, K = _heads(Q, self.H) / math.sqrt(Q.shape[-1] // self.H), _heads(K, self.H)
        return Q @ K.mT, (Q, K, 1 / math.sqrt(Q.shape[-1]))

    def tangent(self, saved, dz):
        (Q, K, s), (dQ, dK) = saved, dz
        T = None if dQ is None else (s * _heads(dQ, self.H)) @ K.mT
        return T if dK is None else _plus(T, Q @ _heads(dK, self.H).mT)

    def adjoint(self, saved, lam):
        Q, K, s = saved
        return _joined(s * (lam @ K)), _joined(lam.mT @ Q)

    def second_order(self, saved, lam):
        lam = saved[2] * lam

        def form(dz, dout):
            dQ, dK = dz
            return (
                None if dK is None else _joined(lam @ _heads(dK, self.H)),
                None if dQ is None else _joined(lam.mT @ _heads(dQ, self.H)),
            )

        return form

    def majorant(self, saved, lam):
        """Head by head C maps K' to lam K' / sqrt(d_h)."""
        U, S, Vh = torch.linalg.svd(saved[2] * lam, full_matrices=False)

        def form(dz, dout):
            dQ, dK = (_heads(t, self.H) for t in dz)
            return _joined(U @ (S[..., None] * (U.mT @ dQ))), _joined(Vh.mT @ (S[..., None] * (Vh @ dK)))

        return form


def _heads(Z, H):  # (n, N, d) -> (n, H, N, d_h)
    return Z.unflatten(-1, (H, -1)).transpose(1, 2)


def _joined(Z):  # (n, H, N, d_h) -> (n, N, d)
    return Z.transpose(1, 2).flatten(2)


def _plus(a, b):
    return b if a is None else a if b is None else a + b


class Softmax:
    """s = softmax(t) in every row, (..., N) -> (..., N).

    D: s o (t' - s.t') = D^T, symmetric.  D^2: with c = lam - s.lam and s' = D[t'] the form is s' o c - s (s'.c).
    Source: Lemma 1 (lem:softmax).
    """

    def forward(self, T):
        s = T.softmax(-1)
        return s, (s,)

    def tangent(self, saved, dz):
        (s,), (dT,) = saved, dz
        return None if dT is None else s * (dT - (s * dT).sum(-1, keepdim=True))

    def adjoint(self, saved, lam):
        (s,) = saved
        return (s * (lam - (s * lam).sum(-1, keepdim=True)),)

    def second_order(self, saved, lam):
        (s,) = saved
        c = lam - (s * lam).sum(-1, keepdim=True)

        def form(dz, dout):
            if dz[0] is None or dout is None:  # a push of the output alone is no tangent of t
                return (None,)
            out = dout * c
            return (out.addcmul_(s, out.sum(-1, keepdim=True), value=-1),)

        return form

    def majorant(self, saved, lam):
        """Row by row the N x N matrix diag(s o c) - s (s o c)^T - (s o c) s^T, by its eigenvectors."""
        (s,) = saved
        sc = s * (lam - (s * lam).sum(-1, keepdim=True))
        cross = s[..., :, None] * sc[..., None, :]
        M = _absolute(torch.diag_embed(sc) - cross - cross.mT)  # (n, H, N_q, N, N)
        return lambda dz, dout: (None if dz[0] is None else (M @ dz[0][..., None])[..., 0],)


class Mixing:
    """O = [A_1 V_1 | ... | A_H V_H]: A (n, H, N_q, N), V (n, N, d) -> (n, N_q, d).

    D^T lam: (lam_h V_h^T, A_h^T lam_h).  D^2: (lam_h V'_h^T, A'_h^T lam_h). Source: Lemma 5 (lem:bilinear).
    """

    def __init__(self, n_heads: int):
        self.H = n_heads

    def forward(self, A, V):
        V = _heads(V, self.H)
        return _joined(A @ V), (A, V)

    def tangent(self, saved, dz):
        (A, V), (dA, dV) = saved, dz
        O = None if dA is None else dA @ V
        O = O if dV is None else _plus(O, A @ _heads(dV, self.H))
        return None if O is None else _joined(O)

    def adjoint(self, saved, lam):
        (A, V), lam = saved, _heads(lam, self.H)
        return lam @ V.mT, _joined(A.mT @ lam)

    def second_order(self, saved, lam):
        lam = _heads(lam, self.H)

        def form(dz, dout):
            dA, dV = dz
            return (
                None if dV is None else lam @ _heads(dV, self.H).mT,
                None if dA is None else _joined(dA.mT @ lam),
            )

        return form

    def majorant(self, saved, lam):
        """<lam, A' V'>, head by head: U S U^T on the rows of A', V S V^T on the columns of V', lam = U S V^T."""
        U, S, Vh = torch.linalg.svd(_heads(lam, self.H), full_matrices=False)

        def form(dz, dout):
            dA, dV = dz
            moved = (_heads(dV, self.H) @ Vh.mT) * S[..., None, :] @ Vh
            return U @ (S[..., None] * (U.mT @ dA)), _joined(moved)

        return form


class Activation:
    """G = act(Z) entry by entry, act one of gelu, gelu_tanh, relu.  D = D^T = diag(act'(Z)), D^2: diag(lam o act''(Z)).

    ReLU: act'' = 0, and act' = 0 at the kink, as torch has it; the form is that of the Hessian almost everywhere.
    Source: Lemma 4 (lem:activations).
    """

    def __init__(self, name: str):
        self.name = name

    def forward(self, Z):
        return ACTIVATIONS[self.name](Z), activation_derivatives(self.name, Z)

    def tangent(self, saved, dz):
        return None if dz[0] is None else saved[0] * dz[0]

    def adjoint(self, saved, lam):
        return (saved[0] * lam,)

    def second_order(self, saved, lam):
        if self.name == "relu":
            return lambda dz, dout: (None,)
        bend = lam * saved[1]
        return lambda dz, dout: (None if dz[0] is None else bend * dz[0],)

    def majorant(self, saved, lam):
        return self.second_order((saved[0], saved[1].abs()), lam.abs())


def activation_derivatives(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """(act'(z), act''(z)); ReLU has slope 0 at its kink, as in torch. Source: Lemma 4 (lem:activations)."""
    if name == "gelu":
        phi = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(z) + z * phi, phi * (2 - z.square())
    if name == "gelu_tanh":
        c, a = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (z + a * z**3))
        sech2 = 1 - t.square()
        slope, bend = c * (1 + 3 * a * z.square()), 6 * c * a * z
        return (1 + t) / 2 + z * sech2 * slope / 2, sech2 * slope + z * sech2 * (bend / 2 - t * slope.square())
    return (z > 0).to(z.dtype), torch.zeros_like(z)


class Normalisation:
    """n = P x / rho in every row, P x = x - mean(x), rho^2 = |P x|^2 / d + eps: (n, N, d) -> (n, N, d).

    D[x'] = (P x' - n (n.x')/d) / rho, symmetric.  D^2: with m = P lam the form is
    -(1/(d rho^2)) [m (n.x') + n (m.x') + (n.lam) P x' - (3/d) (n.lam)(n.x') n].
    LayerNorm is this node, then `Affine`. Source: Lemma 3 (lem:layernorm), (eq:layer-norm).
    """

    def __init__(self, eps: float):
        self.eps = eps

    def forward(self, X):
        centred = X - X.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()  # 1/rho
        n = centred * scale
        return n, (n, scale)

    def tangent(self, saved, dz):
        return None if dz[0] is None else self.adjoint(saved, dz[0])[0]

    def adjoint(self, saved, lam):
        n, scale = saved
        out = lam - lam.mean(-1, keepdim=True)
        return (out.addcmul_(n, (n * lam).sum(-1, keepdim=True), value=-1 / n.shape[-1]).mul_(scale),)

    def second_order(self, saved, lam):
        n, scale = saved
        d, factor = n.shape[-1], -scale.square() / n.shape[-1]
        along = (n * lam).sum(-1, keepdim=True)  # n.lam
        m = factor * (lam - lam.mean(-1, keepdim=True))
        along = factor * along
        skew = m - (3 / d) * along * n  # the form is  m (n.x') + n (skew.x') + along P x'

        def form(dz, dout):
            (dX,) = dz
            if dX is None:
                return (None,)
            out = along * (dX - dX.mean(-1, keepdim=True))
            out.addcmul_(m, (n * dX).sum(-1, keepdim=True))
            return (out.addcmul_(n, (skew * dX).sum(-1, keepdim=True)),)

        return form

    def majorant(self, saved, lam):
        """M is a P outside the plane of n and m and symmetric inside it: |a| P there, a 2 x 2 eigenproblem here."""
        n, scale = saved
        factor = -scale.square() / n.shape[-1]
        a = (factor * (n * lam).sum(-1, keepdim=True)).abs()
        first = _unit(n, -1)
        rest = lam - lam.mean(-1, keepdim=True)
        for _ in range(2):
            rest = rest - first * (first * rest).sum(-1, keepdim=True)
        second = _unit(rest, -1)
        E = torch.stack([first, second], -2)  # (n, N, 2, d)
        form = self.second_order(saved, lam)
        ME = torch.stack([form((e,), None)[0] for e in (first, second)], -2)
        T = _absolute((E @ ME.mT + ME @ E.mT) / 2)

        def majorant(dz, dout):
            (dX,) = dz
            if dX is None:
                return (None,)
            inside = E @ dX[..., None]  # (n, N, 2, 1)
            plain = dX - dX.mean(-1, keepdim=True) - (E.mT @ inside)[..., 0]
            return (a * plain + (E.mT @ (T @ inside))[..., 0],)

        return majorant


class Affine:
    """Z = gamma o X + beta in every row: X (n, N, d), gamma, beta (d,) -> (n, N, d).

    D^T lam: (gamma o lam, sum_t lam_t o x_t, sum_t lam_t).  D^2: (gamma' o lam, sum_t lam_t o x'_t, 0).
    Source: (eq:layer-norm).
    """

    def forward(self, X, gamma, beta):
        return torch.addcmul(beta, X, gamma), (X, gamma)

    def tangent(self, saved, dz):
        (X, gamma), (dX, dgamma, dbeta) = saved, dz
        out = None if dX is None else gamma * dX
        if dgamma is not None:
            moved = dgamma[..., None, :]
            out = X * moved if out is None else out.addcmul_(X, moved)
        if dbeta is not None:
            out = dbeta[..., None, :].expand_as(X) if out is None else out.add_(dbeta[..., None, :])
        return out

    def adjoint(self, saved, lam, sums=False, wanted=(True, True, True)):
        X, gamma = saved
        over = (0, 1) if sums else 1
        return (
            gamma * lam if wanted[0] else None,
            (lam * X).sum(over) if wanted[1] else None,
            lam.sum(over) if wanted[2] else None,
        )

    def second_order(self, saved, lam, sums=False, wanted=(True, True, True)):
        over = (0, 1) if sums else 1

        def form(dz, dout):
            dX, dgamma, _ = dz
            return (
                dgamma[..., None, :] * lam if dgamma is not None and wanted[0] else None,
                (lam * dX).sum(over) if dX is not None and wanted[1] else None,
                None,
            )

        return form

    def majorant(self, saved, lam):
        """Column by column C maps gamma'_j to lam_{.j} gamma'_j: the projection on lam_{.j} times its length."""
        unit = _unit(lam, 1)
        length = (unit * lam).sum(1)  # (n, d)

        def form(dz, dout):
            dX, dgamma, _ = dz
            return unit * (length * (unit * dX).sum(1))[:, None], length * dgamma, None

        return form

    def ridge(self, saved, lam):
        """R X' = sum_t lam_t o x'_t, so lam o (sum_t lam_t o x'_t)."""
        return lambda dz, dout: (None if dz[0] is None else lam * (lam * dz[0]).sum(1, keepdim=True), None, None)


class Embedding:
    """h_0 = [cls ; Z] + pos: Z (n, N_p, d), pos (N, d), cls (d,) or absent (N = N_p then) -> (n, N, d). Linear."""

    def forward(self, Z, pos, cls=None):
        if cls is not None:
            Z = torch.cat([cls.expand(len(Z), 1, -1), Z], 1)
        return Z + pos, (cls is not None, Z.shape)

    def tangent(self, saved, dz):
        (has_cls, shape), (dZ, dpos, *dcls) = saved, dz
        moving = [t for t in dz if t is not None]
        if not moving:
            return None
        out = moving[0].new_zeros(shape)
        if dZ is not None:
            out[:, has_cls:] += dZ
        if dpos is not None:
            out += dpos
        if has_cls and dcls[0] is not None:
            out[:, 0] += dcls[0]
        return out

    def adjoint(self, saved, lam, sums=False, wanted=(True, True, True)):
        has_cls = saved[0]
        parts = (lam[:, has_cls:], lam.sum(0) if sums else lam)
        return (*parts, lam[:, 0].sum(0) if sums else lam[:, 0]) if has_cls else parts

    second_order = None


class Pool:
    """One token for each sample, (n, N, d) -> (n, 1, d): the first ("cls") or the mean ("mean"). Linear."""

    def __init__(self, kind: str):
        self.kind = kind

    def forward(self, X):
        return (X[:, :1] if self.kind == "cls" else X.mean(1, keepdim=True)), (X.shape,)

    def tangent(self, saved, dz):
        return None if dz[0] is None else self.forward(dz[0])[0]

    def adjoint(self, saved, lam):
        (_, N, d) = saved[0]
        if self.kind == "mean":
            return ((lam / N).expand(-1, N, -1),)
        out = lam.new_zeros(len(lam), N, d)
        out[:, :1] = lam
        return (out,)

    second_order = None


class CrossEntropy:
    """l = logsumexp(f) - f_y: f (n, 1, K), labels y (n,) -> (n,).  D = r = p - e_y,  D^2 = S = diag(p) - p p^T.

    r_y = -sum_{c != y} p_c and S f' = p o (g - p.g) with g = f' - f'_top, top the likeliest class: nothing cancels
    however close to 1 its probability is, be it the label or not.
    Source: Lemma 2 (lem:cross-entropy).
    """

    def __init__(self, y: Tensor):
        self.y = y[:, None, None]

    def forward(self, f):
        p = f.softmax(-1)
        r = p.scatter(-1, self.y, 0.0)
        r.scatter_(-1, self.y, -r.sum(-1, keepdim=True))
        return (f.logsumexp(-1, keepdim=True) - f.gather(-1, self.y))[:, 0, 0], (p, r, f.argmax(-1, keepdim=True))

    def tangent(self, saved, dz):
        return None if dz[0] is None else (saved[1] * dz[0]).sum((1, 2))

    def adjoint(self, saved, lam):
        return (lam[:, None, None] * saved[1],)

    def second_order(self, saved, lam):
        p, _, top = saved
        weighted = lam[:, None, None] * p

        def form(dz, dout):
            if dz[0] is None:
                return (None,)
            g = dz[0] - torch.take_along_dim(dz[0], top, -1)  # several directions may share one sample
            return (weighted * (g - (p * g).sum(-1, keepdim=True)),)

        return form

    def majorant(self, saved, lam):
        """S is positive semidefinite, and so is |lam| S."""
        return self.second_order(saved, lam.abs())


class SquaredError:
    """l = mean of (f - e)^2: f (n, N, K), e the one-hot labels y (n,), or targets of f's shape -> (n,).

    D = (2/NK)(f - e),  D^2 = (2/NK) I.
    """

    def __init__(self, y: Tensor):
        self.y = y

    def forward(self, f):
        if self.y.is_floating_point():
            off = f - self.y
        else:
            off = f.scatter_add(-1, self.y[:, None, None], f.new_full((len(f), 1, 1), -1.0))
        return off.square().mean((1, 2)), (2 / off[0].numel() * off,)

    def tangent(self, saved, dz):
        return None if dz[0] is None else (saved[0] * dz[0]).sum((1, 2))

    def adjoint(self, saved, lam):
        return (lam[:, None, None] * saved[0],)

    def second_order(self, saved, lam):
        curvature = 2 / saved[0][0].numel() * lam[:, None, None]
        return lambda dz, dout: (None if dz[0] is None else curvature * dz[0],)

    def majorant(self, saved, lam):
        return self.second_order(saved, lam.abs())


def _like(scale: Tensor, t: Tensor) -> Tensor:
    """(n,) with axes of length 1 behind, as many as t (n, ...) has."""
    return scale.reshape(-1, *[1] * (t.ndim - 1))


def _unit(v: Tensor, dim: int) -> Tensor:
    """v / |v| along an axis, 0 for 0, without underflow of the squares."""
    v = v / v.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return v / v.norm(dim=dim, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def _absolute(M: Tensor) -> Tensor:
    """|M| of symmetric matrices (..., m, m)."""
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values.abs()[..., None, :]) @ vectors.mT


LOSS_NODES = {"cross_entropy": CrossEntropy, "mse": SquaredError}
PARAMETRIC = (Linear, Affine, Embedding)  # inputs after the first are parameters
BILINEAR = (Linear, Score, Mixing, Affine)  # D^2 couples the first two inputs


# --- networks as chains -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """output = node(inputs), values by name; an input that no step makes is a parameter, or "x", the data."""

    node: object
    inputs: tuple[str, ...]
    output: str


PIECES = (ViT, MLP, Block, Attention, MultilayerPerceptron, models.LayerNorm, nn.Linear, nn.ModuleList)


def steps_of(model: ViT | MLP) -> list[Step]:
    """The network from "x" to the logits "f" as steps; parameters have the names of `named_parameters`.

    With CLS pooling only one row of the last block reaches the head, so its queries, output and MLP have one row.
    """
    return _vit_steps(model) if isinstance(model, ViT) else _mlp_steps(model)


def known(model: nn.Module) -> bool:
    """Whether the model computes what `steps_of` says: exactly a `utils.models.ViT` or `MLP`, every part as built.

    A subclass, a replaced layer, a patched `forward` or a hook makes it unknown.
    """
    return type(model) in (ViT, MLP) and all(
        type(m) in PIECES and "forward" not in vars(m) and not m._forward_hooks and not m._forward_pre_hooks
        for m in model.modules()
    )


def data_of(model: ViT | MLP, x: Tensor) -> Tensor:
    """What the first step reads: the patches (n, N_p, C p^2) of images, or the flattened input (n, 1, d_in)."""
    return model.patches(x) if isinstance(model, ViT) else x.flatten(1)[:, None]


def _linear(output: str, source: str, name: str, bias: bool = True) -> Step:
    return Step(Linear(), (source, f"{name}.weight", *([f"{name}.bias"] if bias else [])), output)


def _mlp_steps(model: MLP) -> list[Step]:
    steps, h = [], "x"
    for i in range(len(model.layers)):
        last = i == len(model.layers) - 1
        steps.append(_linear("f" if last else f"layers.{i}.Z", h, f"layers.{i}", model.config.bias))
        if not last:
            steps.append(Step(Activation(model.config.activation), (f"layers.{i}.Z",), f"layers.{i}.G"))
            h = f"layers.{i}.G"
    return steps


def _vit_steps(model: ViT) -> list[Step]:
    c = model.config

    def norm(output, source, name):
        normalise = Step(Normalisation(c.eps), (source,), f"{output}.n")
        return [normalise, Step(Affine(), (f"{output}.n", f"{name}.weight", f"{name}.bias"), output)]

    def attention(
        p, X, queries
    ):  # X (n, N, d) and the rows that ask, both by name -> steps that end in p.attention.out
        a = f"{p}.attention"
        return [
            _linear(f"{a}.Q", queries, f"{a}.query"),
            _linear(f"{a}.K", X, f"{a}.key"),
            _linear(f"{a}.V", X, f"{a}.value"),
            Step(Score(c.n_heads), (f"{a}.Q", f"{a}.K"), f"{a}.T"),
            Step(Softmax(), (f"{a}.T",), f"{a}.A"),
            Step(Mixing(c.n_heads), (f"{a}.A", f"{a}.V"), f"{a}.O"),
            _linear(f"{a}.Y", f"{a}.O", f"{a}.out"),
        ]

    def mlp(p, source):
        return [
            _linear(f"{p}.mlp.Z", source, f"{p}.mlp.fc1"),
            Step(Activation(c.activation), (f"{p}.mlp.Z",), f"{p}.mlp.G"),
            _linear(f"{p}.mlp.Y", f"{p}.mlp.G", f"{p}.mlp.fc2"),
        ]

    cls = c.pool == "cls"
    steps = [_linear("embed.Z", "x", "embed"), Step(Embedding(), ("embed.Z", "pos", *(["cls"] if cls else [])), "h")]
    h = "h"
    for i in range(c.depth):
        p, one_row = f"blocks.{i}", cls and i == c.depth - 1
        X = h
        if c.norm == "pre":
            X = f"{p}.X"
            steps += norm(X, h, f"{p}.norm1")
        queries, kept = X, h
        if one_row:
            queries, kept = f"{p}.X_query", f"{p}.h_query"
            steps.append(Step(Pool("cls"), (X,), queries))
            if c.norm == "pre":
                steps.append(Step(Pool("cls"), (h,), kept))
            else:
                kept = queries
        steps += attention(p, X, queries)
        steps.append(Step(Add(), (kept, f"{p}.attention.Y"), f"{p}.middle"))
        read, h = f"{p}.read", f"{p}.h"
        steps += norm(read, f"{p}.middle", f"{p}.norm2" if c.norm == "pre" else f"{p}.norm1")
        steps += mlp(p, read)
        if c.norm == "pre":
            steps.append(Step(Add(), (f"{p}.middle", f"{p}.mlp.Y"), h))
        else:
            steps += [Step(Add(), (read, f"{p}.mlp.Y"), f"{p}.sum"), *norm(h, f"{p}.sum", f"{p}.norm2")]
    if not cls or c.depth == 0:
        steps.append(Step(Pool(c.pool), (h,), "v"))
        h = "v"
    if c.norm == "pre":
        steps += norm("v_normed", h, "norm")
        h = "v_normed"
    return [*steps, _linear("f", h, "head")]


# --- the walks ------------------------------------------------------------------------------------------


@dataclass
class Target:
    """Where a parameter's part of a product goes: `value` (n, ...), whose content counts once it is `filled`."""

    value: Tensor
    filled: bool = False

    def add(self, part: Tensor) -> None:
        self.value.add_(part) if self.filled else self.value.copy_(part)
        self.filled = True


@dataclass
class Tape:
    """One pass of a batch with everything that products share: values, adjoints, and the forms <lam_z, D^2 phi>.

    steps    of the network; the loss node is added here
    point    parameters by name, of which only those in `moving` have tangents and gradients
    x, y     what the first step reads (n, ...), labels (n,) (for "mse" also targets of the shape of "f")
    sums     False: each sample has its own direction and its own product (leading axis n); True: one direction for
             all, and products and gradients are summed over the samples
    weights  of the samples' losses (n,) in gradients and products; default: ones
    losses   (n,), after construction

    `values` keeps the activations by name, for the bounds and for tests.
    """

    steps: list[Step]
    point: dict[str, Tensor]
    x: Tensor
    y: Tensor
    loss: str = "cross_entropy"
    moving: tuple[str, ...] | None = None
    sums: bool = False
    weights: Tensor | None = None
    losses: Tensor = field(init=False)
    values: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.moving = tuple(self.point) if self.moving is None else tuple(self.moving)
        self._chain = [*self.steps, Step(LOSS_NODES[self.loss](self.y), ("f",), "loss")]
        self.values = dict(self.point) | {"x": self.x}
        self._saved, alive = [], set(self.moving)
        self._wanted = []  # for each step, which inputs depend on a moving parameter
        for step in self._chain:
            self.values[step.output], saved = step.node.forward(*(self.values[name] for name in step.inputs))
            self._saved.append(saved)
            wanted = tuple(name in alive for name in step.inputs)
            self._wanted.append(wanted + (False,) * (3 - len(wanted)))
            if any(wanted):
                alive.add(step.output)
        self.losses = self.values["loss"]
        self._adjoints, self._forms, self._majorants, self.sigma, self.mu = None, None, {}, {}, None

    def _options(self, i: int) -> dict:
        if isinstance(self._chain[i].node, PARAMETRIC):
            return {"sums": self.sums, "wanted": self._wanted[i]}
        return {}

    def _back(self, start: dict, forms: list | None, tangents: dict | None, first: int, targets: dict) -> dict:
        """The walk back over the steps before `first` from the adjoints in `start`; adds the forms of the tangents.

        Parts of the parameters in `targets` are added there.
        """
        found = dict(start)
        for i in reversed(range(first)):
            step, wanted = self._chain[i], self._wanted[i]
            if not any(wanted):
                continue
            into = {}
            if isinstance(step.node, Linear) and step.inputs[1] in targets:
                into = {"into": targets[step.inputs[1]]}
            parts = []
            lam = found.get(step.output)
            if lam is not None:
                parts.append(step.node.adjoint(self._saved[i], lam, **self._options(i), **into))
            if forms is not None and forms[i] is not None:
                dz = tuple(tangents.get(name) for name in step.inputs)
                parts.append(forms[i](dz, tangents.get(step.output), **into))
            for part in parts:
                for name, value, want in zip(step.inputs, part, wanted):
                    if want and value is not None:
                        if name in targets:
                            targets[name].add(value)
                        else:
                            found[name] = value if name not in found else found[name] + value
        return found

    @property
    def adjoints(self) -> dict[str, Tensor]:
        """dl/dz of every value by name; for the moving parameters the gradient, (n, ...) or summed over the samples."""
        if self._adjoints is None:
            start = torch.ones_like(self.losses) if self.weights is None else self.weights
            self._adjoints = self._back({"loss": start}, None, None, len(self._chain), {})
        return self._adjoints

    def gradient(self) -> dict[str, Tensor]:
        """Gradients by parameter: (n, ...), or summed over the samples. None where a parameter has no influence."""
        return {name: self.adjoints.get(name) for name in self.moving}

    def _forms_of(self) -> list:
        if self._forms is None:
            lam = self.adjoints
            self._forms = [
                step.node.second_order(self._saved[i], lam[step.output], **self._options(i))
                if step.node.second_order is not None and any(self._wanted[i]) and step.output in lam
                else None
                for i, step in enumerate(self._chain)
            ]
        return self._forms

    def _majorants_of(self, ridge: bool = False) -> list:
        if ridge not in self._majorants:
            lam = self.adjoints
            self._majorants[ridge] = [
                self._weighted(i, self._saved[i], lam[step.output], ridge)
                if step.node.second_order is not None and any(self._wanted[i]) and step.output in lam
                else None
                for i, step in enumerate(self._chain)
            ]
        return self._majorants[ridge]

    def _weighted(self, i: int, saved, lam, ridge: bool):
        """The node's majorant; the halves of a coupling times sigma and 1/sigma, its ridge form by mu."""
        node = self._chain[i].node
        if not isinstance(node, BILINEAR):
            return node.majorant(saved, lam)
        if ridge and isinstance(node, PARAMETRIC):
            squares = node.ridge(saved, lam)

            def scaled(dz, dout, into=None):
                first = squares(dz, dout)[0] if self._wanted[i][1] else None  # a parameter at rest is not coupled
                return None if first is None else first / _like(self.mu, first), None, None

            return scaled
        form = node.majorant(saved, lam)

        def weighted(dz, dout, into=None):
            if dz[0] is None or dz[1] is None:  # what does not move is coupled with nothing
                return (None,) * len(dz)
            first, second, *rest = form(dz, dout)
            sigma = self.sigma.get(i)
            if sigma is not None:
                first, second = first * _like(sigma, first), second / _like(sigma, second)
            return (first, second, *rest)

        return weighted

    def balance(self, direction: dict[str, Tensor], ridge: bool = False) -> None:
        """Bring every coupling's sigma (n,) halfway to where its majorant is smallest along `direction` (n, ...).

        2 <x, C y> <= sigma <x, |C^T| x> + <y, |C| y> / sigma holds for every sigma > 0; at x, y it is smallest at
        sigma^2 = <y, |C| y> / <x, |C^T| x>. The norm of Q is convex in the logarithms of the sigmas, and at its top
        eigenvector this is a step of descent; the whole step would swing between nearly equal eigenvalues.
        With `ridge` the couplings with parameters are left out: they have mu. Source: Theorem (thm:majorant).
        """
        tangents, majorants = self.tangents(direction), self._majorants_of(ridge)
        for i, step in enumerate(self._chain):
            if majorants[i] is None or not isinstance(step.node, BILINEAR):
                continue
            dz = tuple(tangents.get(name) for name in step.inputs)
            if dz[0] is None or dz[1] is None or (ridge and isinstance(step.node, PARAMETRIC)):
                continue
            # sigma^2 <x, |C^T| x> / <y, |C| y> of the sigma so far
            x, y = ((t * part).flatten(1).sum(1).clamp_min(0) for t, part in zip(dz, majorants[i](dz, None)[:2]))
            change = ((y / x) ** 0.25).nan_to_num(nan=1.0).clamp(1 / 8, 8)  # a step of descent, not a jump
            self.sigma[i] = change * self.sigma.get(i, torch.ones_like(change))

    def tangents(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        """z' of every value up to the logits, by name, along tangents of the moving parameters."""
        found = dict(direction)
        for i, step in enumerate(self._chain[:-1]):
            if any(self._wanted[i]):
                found[step.output] = step.node.tangent(self._saved[i], tuple(found.get(name) for name in step.inputs))
        return found

    def product(self, direction: dict[str, Tensor], part: str = "full", out: dict[str, Tensor] | None = None) -> dict:
        """Hessian times direction by parameter, shapes as in `gradient`; None where it is zero.

        part: "full", "gauss_newton" (J^T S J, S the Hessian of the loss in the logits), "functional" (the rest), or,
        with one direction a sample, "majorant": J^T S J plus the majorants of all nodes, a matrix Q with -Q <= H <= Q,
        or "ridge": the same with the couplings of parameters as R^T R / mu, mu (n,), so that -Q - mu <= H <= Q + mu.
        out: tensors by name, of the shapes of `gradient`, that take the result, zeros included.
        Source: Theorem (thm:adjoint).
        """
        targets = {name: Target(value) for name, value in (out or {}).items()}
        tangents = self.tangents(direction)
        forms = self._majorants_of(part == "ridge") if part in ("majorant", "ridge") else self._forms_of()
        last = len(self._chain) - 1
        start = {"f": forms[last]((tangents["f"],), None)[0]} if part != "functional" else {}
        found = self._back(start, None if part == "gauss_newton" else forms, tangents, last, targets)
        for target in targets.values():
            if not target.filled:
                target.value.zero_()
        return {name: targets[name].value if name in targets else found.get(name) for name in self.moving}


# --- the calculus against automatic differentiation ----------------------------------------------------


def agreement(dtype: torch.dtype = torch.float64, seed: int = 0, *, n_tokens: int = 5, d: int = 8) -> dict[str, float]:
    """Relative Frobenius distance between the calculus and automatic differentiation, by expression.

    One post-norm block (two heads, GELU, random weights, biases and gains) on one random input (n_tokens, d).
    Jacobians are those of the outputs in the inputs. Hessians are those of the mean squared distance to a random
    target, of attention between its weights and of the block in all its weights; LayerNorm's is its functional part, in
    the input. The reference is reverse mode for Jacobians and double backward for Hessians, through the modules of
    `utils.models`, in the same precision.
    """
    side = math.isqrt(n_tokens - 1)  # any image whose patches are as many will do: only the block is used
    sizes = dict(image_size=2 * side, channels=1, patch_size=2, n_classes=2, depth=1, n_heads=2, d_model=d, d_ff=2 * d)
    generator = torch.Generator().manual_seed(seed)
    model = ViT(ViTConfig(**sizes, norm="post", pool="mean")).to(dtype)
    block, p = model.blocks[0], "blocks.0"
    with torch.no_grad():
        for name, t in block.named_parameters():
            t.copy_(0.5 * torch.randn(t.shape, generator=generator) + (name in ("norm1.weight", "norm2.weight")))
    X, target = torch.randn(2, 1, n_tokens, d, generator=generator).to(dtype)
    steps = [s for s in steps_of(model) if s.output.startswith(p)]
    weights = {f"{p}.{name}": t.detach() for name, t in block.named_parameters()}
    attention = [f"{p}.attention.{name}.weight" for name in ("query", "key", "value")]

    def ours(first, last, source, moving):
        """Tape over the steps from `first` to `last`, whose input is named `source`."""
        names = [s.output for s in steps]
        chain = steps[names.index(first) : names.index(last) + 1]
        chain = [Step(s.node, s.inputs, "f" if s.output == last else s.output) for s in chain]
        return Tape(chain, weights | {source: X}, X, target, "mse", tuple(moving))

    def units(t):  # one basis vector after the other, with the sample in front
        return torch.eye(t.numel(), dtype=dtype).reshape(-1, 1, *t.shape[1:])

    def jacobian(tape, source):  # (out, in)
        return torch.stack([tape.tangents({source: e})["f"].flatten() for e in units(X)], 1)

    def hessian(tape, moving, part="full"):  # (P, P)
        point, rows = {name: tape.point[name] for name in moving}, []
        leading = {name: t if t.ndim == 3 and t.shape[0] == 1 else t[None] for name, t in point.items()}
        for name, t in leading.items():
            for e in units(t):
                along = {other: e if other == name else torch.zeros_like(u) for other, u in leading.items()}
                found = tape.product(along, part)
                parts = [found[o].flatten() if found[o] is not None else u.flatten() * 0 for o, u in leading.items()]
                rows.append(torch.cat(parts))
        return torch.stack(rows)

    def through(module, prefix, moving):  # the module as a function of some of its weights, or of its input X
        rest = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

        def call(*tensors):
            given = dict(zip(moving, tensors))
            own = rest | {k.removeprefix(prefix): v for k, v in given.items() if k != "X"}
            return torch.func.functional_call(module, own, (given.get("X", X),))

        return call

    def reference_jacobian(module, prefix):
        return torch.autograd.functional.jacobian(through(module, prefix, ["X"]), X).reshape(X.numel(), X.numel())

    def reference_hessian(module, prefix, moving, value=lambda F: (F - target).square().mean()):
        call = through(module, prefix, moving)
        point = tuple(X if name == "X" else weights[name] for name in moving)
        blocks = torch.autograd.functional.hessian(lambda *t: value(call(*t)), point)
        return torch.cat([torch.cat([b.reshape(a.numel(), -1) for b in row], 1) for a, row in zip(point, blocks)])

    def distance(a, b):
        return ((a - b).norm() / b.norm()).item()

    out, mid = f"{p}.attention.Y", f"{p}.middle"
    ln = ours(f"{p}.read.n", f"{p}.read", mid, [mid])
    ffn = ours(f"{p}.mlp.Z", f"{p}.mlp.Y", f"{p}.read", [f"{p}.read"])
    att = ours(f"{p}.attention.Q", out, "h", attention)
    whole, of_weights = (ours(f"{p}.attention.Q", f"{p}.h", "h", moving) for moving in (["h"], weights))
    norm_hessian = reference_hessian(block.norm1, f"{p}.norm1.", ["X"], lambda F: (ln.adjoints["f"] * F).sum())
    mine, theirs = hessian(att, attention), reference_hessian(block.attention, f"{p}.attention.", attention)
    place = {letter: slice(i * d * d, (i + 1) * d * d) for i, letter in enumerate("QKV")}
    blocks = [(place[a], place[b]) for a, b in ("QQ", "QK", "QV", "VV")]
    names = list(weights)
    return {
        "LayerNorm Jacobian": distance(jacobian(ln, mid), reference_jacobian(block.norm1, f"{p}.norm1.")),
        "LayerNorm Hessian": distance(hessian(ln, [mid], "functional"), norm_hessian),
        "FFN Jacobian": distance(jacobian(ffn, f"{p}.read"), reference_jacobian(block.mlp, f"{p}.mlp.")),
        "attention Hessian QQ": distance(mine[blocks[0]], theirs[blocks[0]]),
        "attention Hessian QK": distance(mine[blocks[1]], theirs[blocks[1]]),
        "attention Hessian QV": distance(mine[blocks[2]], theirs[blocks[2]]),
        "attention Hessian VV": distance(mine[blocks[3]], theirs[blocks[3]]),
        "block Jacobian": distance(jacobian(whole, "h"), reference_jacobian(block, f"{p}.")),
        "block Hessian": distance(hessian(of_weights, names), reference_hessian(block, f"{p}.", names)),
    }
