"""Bounds of ||H_i|| at one point of weight space from the second-order forms of the network's own nodes.

Theorem (thm:adjoint) splits a sample's Hessian, H = J^T S J + sum over nodes z of X_z'^T M_z X_z', exactly: M_z is the
matrix of < lam_z, D^2 phi_z >, with the adjoint lam_z of one backward pass, and X_z' the map from the weights to the
inputs of z. J^T S J is known from K backward passes. What is bounded, and how, makes the rung:

    adjoint    ||M_z|| exactly, X_z' by products of norms from the weights on             (thm:forms)
    blocks     |M_z|^(1/2) X_z' exactly inside a block, by norms of block Jacobians above   (thm:forms)
    tangents   |M_z|^(1/2) X_z' exactly for every node and group of weights               (thm:forms)
    majorant   the sum over z of |M_z| together, its largest eigenvalue by products       (thm:majorant), probability
    deflated   H itself on a Krylov space, the trace of the majorant on the rest          (thm:deflation), deterministic

All but the majorant are deterministic, up to rounding. They know the networks of `utils.models` as they are. A group is
the parameters of one module, weight and bias together. Here every walk is one sample's, with its leading axis free for
directions: `rows` (k, *shape) are k linear forms of a value (1, *shape).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from utils import curvature
from utils.calculus import (
    PARAMETRIC,
    Activation,
    Add,
    Affine,
    Linear,
    Mixing,
    Normalisation,
    Pool,
    Score,
    Softmax,
    Step,
    Tape,
)

ROUNDING = 1 + 1e-10
SMALL_MATRIX = ("adjoint", "blocks", "tangents")
BY_PRODUCTS = ("majorant", "deflated")
LARGE = 256  # rows of a matrix for which a factorisation is cheaper than all its eigenvalues
LEAST = 1e-140  # of mu: adjoints so small that their squares underflow are then inside the rounding of mu


def spectral(M: Tensor) -> Tensor:
    """||M|| for (..., a, b), by the smaller Gram matrix of M scaled to entries <= 1; 0 for an empty matrix."""
    if 0 in M.shape[-2:]:
        return M.new_zeros(M.shape[:-2])
    scale = M.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    M = M / scale
    gram = M @ M.mT if M.shape[-2] < M.shape[-1] else M.mT @ M
    return _largest(gram).clamp(min=0).sqrt() * scale[..., 0, 0]


def _largest(G: Tensor) -> Tensor:
    """Largest eigenvalue of the symmetric matrices G (..., n, n), never below it but for rounding.

    Of a large one it is t = (1 + 1e-9) times ARPACK's estimate from below, where a Cholesky factorisation shows that
    t - G is positive definite; otherwise the last of all its eigenvalues.
    """
    if G.ndim == 2 and len(G) >= LARGE and G.device.type == "cpu":
        start = np.random.default_rng(0).normal(size=len(G))
        try:
            below = eigsh(G.numpy(), 1, which="LA", v0=start, tol=1e-5, return_eigenvectors=False)
        except ArpackError:  # a matrix of zeros, or one that has not converged
            below = np.zeros(1)
        t = G.new_tensor((1 + 1e-9) * below[0])
        if torch.linalg.cholesky_ex(torch.diag(t.expand(len(G))) - G).info == 0:
            return t
    return torch.linalg.eigvalsh(G)[..., -1]


def softmax_first(s: Tensor) -> Tensor:
    """||Ds|| = largest eigenvalue of diag(s) - s s^T for every row of probabilities: (..., N) -> (...).

    The eigenvalue is the root in (s_2, s_1) (largest two entries) of s_1/(s_1 - t) = sum_{i>1} s_i/(t - s_i):
    the secular equation, divided by t with the help of sum s = 1, so that nothing cancels when the row is
    saturated. Bisection keeps the upper end: never below the eigenvalue, 1e-12 above it at most (relative).
    Source: Lemma 1 (lem:softmax), part (i).
    """
    s = s.sort(-1, descending=True).values
    first, rest = s[..., 0], s[..., 1:]
    if rest.shape[-1] == 0:
        return torch.zeros_like(first)
    others = rest.sum(-1)  # 1 - s_1 without cancellation
    low = rest[..., 0]
    gershgorin = 2 * torch.maximum(first * others, low * (1 - low))
    high = torch.minimum(torch.minimum(first, gershgorin.clamp(max=0.5)), 2 * others)
    high = torch.maximum(high, low)
    for _ in range(60):
        middle = (low + high) / 2
        above = first / (first - middle) >= (rest / (middle[..., None] - rest)).nan_to_num(nan=0.0).sum(-1)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high * (1 + 1e-12)


def covariances(A: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max over heads and rows t of ||Cov_t K||^(1/2), ||Cov_t V||^(1/2), ||Cov_t(V, K)|| under row t of A, each (n,).

    A (n, H, N_q, N), K and V (n, H, N, d_h). Raised by what the difference E x y - E x E y can lose to rounding.
    Source: Lemma (lem:covariance).
    """

    def outer(x, y):
        return x[..., :, None] * y[..., None, :]

    def covariance(X, Y):
        X, Y = X - X.mean(-2, keepdim=True), Y - Y.mean(-2, keepdim=True)
        moment = (A @ outer(X, Y).flatten(-2)).unflatten(-1, (X.shape[-1], Y.shape[-1]))  # (n, H, N_q, d_h, d_h)
        slack = 1e-14 * (X.norm(dim=-1).amax((1, 2)) * Y.norm(dim=-1).amax((1, 2)))
        return spectral(moment - outer(A @ X, A @ Y)).amax((1, 2)) + slack

    return covariance(K, K).sqrt(), covariance(V, V).sqrt(), covariance(V, K)


def group_of(parameter: str) -> str:
    """The module of a parameter ("blocks.0.mlp.fc1"), or its own name where it stands alone ("pos")."""
    return parameter.rsplit(".", 1)[0]


def units(value: Tensor) -> Tensor:
    """The unit forms of a value (1, *shape): (numbers in it, *shape)."""
    return torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape[1:])


# --- walks of one sample ------------------------------------------------------------------------------


class Walk:
    """One sample's steps with what was saved at each, the adjoints, and which values depend on the moving weights."""

    def __init__(self, losses: curvature.Losses, row: int, groups: list[str]):
        self.tape: Tape = losses._tape(losses.point, torch.tensor([row], device=losses.x.device))
        self.steps: list[Step] = self.tape._chain[:-1]
        self.saved, self.wanted, self.values = self.tape._saved, self.tape._wanted, self.tape.values
        self.groups = {name: g for g, name in enumerate(groups)}

    @property
    def zeros(self) -> Tensor:
        return self.values["f"].new_zeros(len(self.groups))

    def active(self, i: int) -> list[tuple[int, str]]:
        """Place and name of the inputs of step i that are values, not parameters, and depend on moving weights."""
        step, n = self.steps[i], 1 if isinstance(self.steps[i].node, PARAMETRIC) else len(self.steps[i].inputs)
        return [(k, name) for k, name in enumerate(step.inputs[:n]) if self.wanted[i][k]]

    def pull(self, i: int, rows: Tensor) -> dict[str, Tensor]:
        """Forms of the output of step i as forms of its inputs: D phi^T."""
        step = self.steps[i]
        options = {"wanted": (True, False, False)} if isinstance(step.node, (Linear, Affine)) else {}
        parts = step.node.adjoint(self.saved[i], rows, **options)
        return {name: parts[k] for k, name in self.active(i)}

    def has_weights(self, i: int) -> bool:
        """Whether step i reads weights that move."""
        return isinstance(self.steps[i].node, PARAMETRIC) and any(self.wanted[i][1:])

    def on_weights(self, i: int, rows: Tensor) -> dict[str, Tensor]:
        """For each group of step i a matrix (k, .) with the singular values of rows o D_W phi, [W b] on [X 1]."""
        step, saved = self.steps[i], self.saved[i]
        if not self.has_weights(i):
            return {}
        if isinstance(step.node, Linear):
            U, s, _ = torch.linalg.svd(_with_bias(saved), full_matrices=False)
            return {group_of(step.inputs[1]): torch.einsum("kto,ts->kso", rows, U * s).flatten(1)}
        if isinstance(step.node, Affine):
            n = saved[0][0]
            return {group_of(step.inputs[1]): torch.cat([(rows * n).sum(1), rows.sum(1)], 1)}
        found = {step.inputs[1]: rows.flatten(1)}
        return found | ({step.inputs[2]: rows[:, 0]} if saved[0] else {})

    def norms_on_weights(self, i: int) -> dict[str, Tensor]:
        """||D_W phi|| for each group of step i: the norm of [X 1], the largest of [n_j 1], 1 for the embedding."""
        step, saved = self.steps[i], self.saved[i]
        if not self.has_weights(i):
            return {}
        if isinstance(step.node, Linear):
            return {group_of(step.inputs[1]): spectral(_with_bias(saved))}
        if isinstance(step.node, Affine):
            n = saved[0][0].mT[..., None]  # (d, N, 1)
            return {group_of(step.inputs[1]): spectral(torch.cat([n, torch.ones_like(n)], 2)).max()}
        return dict.fromkeys(step.inputs[1:], torch.ones_like(self.values["f"][0, 0, 0]))

    def back(self, rows: Tensor, name: str, first: int, last: int, visit: Callable) -> Tensor | None:
        """Walk forms of the value `name` back over the steps first-1, ..., last; visit(group, matrix) at the weights.

        Returns the forms that arrive at the input of step `last`, None if none do.
        """
        found = {name: rows}
        for i in reversed(range(last, first)):
            here = found.pop(self.steps[i].output, None)
            if here is None:
                continue
            for group, matrix in self.on_weights(i, here).items():
                if group in self.groups:
                    visit(self.groups[group], matrix)
            for source, part in self.pull(i, here).items():
                found[source] = part if source not in found else found[source] + part
        return next(iter(found.values()), None)


def _with_bias(saved) -> Tensor:
    """[X 1] of a linear map with a bias, X without: (N, in + 1) or (N, in)."""
    X, _, bias = saved
    return torch.cat([X[0], torch.ones_like(X[0, :, :1])], 1) if bias else X[0]


# --- small matrices: adjoint, blocks, tangents (Theorem (thm:forms)) -----------------------------------


def roots(step: Step, saved, lam: Tensor) -> list[tuple[int, Tensor, Callable[[], Tensor]]]:
    """(place of an input, ||R||, R on demand): forms R (k, *shape) of the inputs that bound < lam, D^2 phi >.

    One input x:  |< lam, D^2 phi [x', x'] >| <= |R x'|^2, R^T R = |M|.
    Two values:   < lam, D^2 phi [x', y'] > = <x', C y'>, R_x^T R_x = |C^T|, R_y^T R_y = |C|.
    A value and a parameter: R x' is the gradient in the parameter of < lam, D^2 phi [x', .] >.
    One sample, empty for a linear node. Source: Theorem (thm:forms).
    """
    node = step.node
    if isinstance(node, Activation):
        bend = (saved[1] * lam)[0].abs().sqrt()
        return [(0, bend.max(), lambda: torch.diag(bend.flatten()).reshape(-1, *bend.shape))]
    if isinstance(node, (Softmax, Normalisation)):
        last = lam.shape[-1]
        eye = torch.eye(last, dtype=lam.dtype, device=lam.device).reshape(last, *[1] * (lam.ndim - 2), last)
        M = node.majorant(saved, lam)((eye.expand(last, *lam.shape[1:]).contiguous(),), None)[0].movedim(0, -1)
        values, vectors = torch.linalg.eigh((M + M.mT) / 2)
        half = values.clamp(min=0).sqrt()
        return [(0, half.max(), lambda: _spread(half[..., :, None] * vectors.mT))]
    if isinstance(node, Linear):
        _, s, Vh = torch.linalg.svd(lam[0].mT, full_matrices=False)  # R X' = lam^T X', the left factor is a rotation
        return [(0, s.max(), lambda: _along_tokens(s[:, None] * Vh, saved[0].shape[-1]))]
    if isinstance(node, Affine):
        return [(0, lam[0].norm(dim=0).max(), lambda: torch.diag_embed(lam[0]).movedim(0, 1).contiguous())]
    if isinstance(node, Score):  # <lam_h, Q'_h K'_h^T>: C = lam on the tokens of each head
        U, s, Vh = torch.linalg.svd(saved[2] * lam[0], full_matrices=False)
        half, d_h = s.sqrt(), saved[0].shape[-1]
        return [(k, half.max(), lambda B=B: _by_heads(half[..., None] * B, d_h)) for k, B in ((0, U.mT), (1, Vh))]
    if isinstance(node, Mixing):  # <lam_h, A'_h V'_h>: C = lam between query tokens and columns
        H, N, d_h = saved[1].shape[1:]
        U, s, Vh = torch.linalg.svd(lam[0].unflatten(-1, (H, d_h)).transpose(0, 1), full_matrices=False)
        half = s.sqrt()
        heads, eye = (torch.eye(m, dtype=s.dtype, device=s.device) for m in (H, N))

        def of_A():
            return torch.einsum("gh,grq,jt->grjhqt", heads, half[..., None] * U.mT, eye).flatten(0, 2)

        def of_V():
            return torch.einsum("gh,grc,jt->grjthc", heads, half[..., None] * Vh, eye).flatten(0, 2).flatten(2)

        return [(0, half.max(), of_A), (1, half.max(), of_V)]
    return []


def _spread(B: Tensor) -> Tensor:
    """Blocks B (*places, k, last) as forms of a value of shape (*places, last): (places * k, *places, last)."""
    places = B.shape[:-2]
    flat = B.flatten(0, -3)  # (T, k, last)
    eye = torch.eye(len(flat), dtype=B.dtype, device=B.device)
    rows = torch.einsum("ts,tkc->tksc", eye, flat).flatten(0, 1)
    return rows.reshape(len(rows), *places, B.shape[-1])


def _along_tokens(B: Tensor, width: int) -> Tensor:
    """(r, N) on the tokens of every column: (r * width, N, width)."""
    eye = torch.eye(width, dtype=B.dtype, device=B.device)
    return torch.einsum("rt,jc->rjtc", B, eye).flatten(0, 1)


def _by_heads(B: Tensor, d_h: int) -> Tensor:
    """(H, r, N) on the tokens of every column of each head: (H * r * d_h, N, H * d_h)."""
    heads, eye = (torch.eye(m, dtype=B.dtype, device=B.device) for m in (len(B), d_h))
    return torch.einsum("grt,gh,jc->grjthc", B, heads, eye).reshape(-1, B.shape[-1], len(B) * d_h)


def gauss_newton(walk: Walk) -> tuple[Tensor, Tensor]:
    """||J^T S J|| and the norms (m, m) of its blocks, exactly, from one backward pass for each class.

    With F_g = S^(1/2) J_g of a group and F_g^T = Q_g R_g, R_g (K, K), the block F_g^T F_g' has the norm of R_g R_g'^T.
    Source: Theorem (thm:forms).
    """
    f, loss = walk.values["f"], walk.tape._chain[-1].node
    S = loss.second_order(walk.tape._saved[-1], torch.ones_like(walk.tape.losses))((units(f),), None)[0].flatten(1)
    values, vectors = torch.linalg.eigh((S + S.mT) / 2)
    R = f.new_zeros(len(walk.groups), len(S), len(S))

    def visit(g, matrix):
        r = torch.linalg.qr(matrix.mT, mode="r").R
        R[g, : len(r)] = r

    walk.back((values.clamp(min=0).sqrt() * vectors).mT.reshape(-1, *f.shape[1:]), "f", len(walk.steps), 0, visit)
    return spectral(R.flatten(0, 1)) ** 2, spectral(R[:, None] @ R[None].mT)


def functional(walk: Walk, reach: Callable[[int, str, Tensor, Callable], Tensor], steps: range, B: Tensor) -> None:
    """Add to B (m, m) what bounds the blocks of sum_z X_z'^T M_z X_z' over the given steps.

    reach(i, name, ||R||, build) -> (m,) bounds ||R dx/dw_g|| for the forms R = build() of the input `name` of step i.
    Source: Theorem (thm:forms).
    """
    for i in steps:
        step = walk.steps[i]
        lam, values = walk.tape.adjoints.get(step.output), dict(walk.active(i))
        if step.node.second_order is None or lam is None or not values:
            continue
        found = [reach(i, values[k], *root) for k, *root in roots(step, walk.saved[i], lam) if k in values]
        if isinstance(step.node, PARAMETRIC):
            g = walk.groups.get(group_of(step.inputs[1]))
            if g is not None and walk.wanted[i][1]:
                B[g] += found[0]
                B[:, g] += found[0]
        elif len(step.inputs) == 1:
            B += torch.outer(found[0], found[0])
        elif len(found) == 2:
            cross = torch.outer(*found)
            B += cross + cross.mT


def cuts(steps: list[Step]) -> list[int]:
    """Places of the steps whose output is the residual stream between two blocks: all above acts through it."""
    return [i for i, step in enumerate(steps) if step.output.split(".")[-1] == "h"]


def measured_tangents(walk: Walk, whole: bool) -> Tensor:
    """B (m, m) with every ||R dx/dw_g|| measured (`whole`), or measured inside a block and bounded above it.

    Above: ||R dx/dh|| ||dh/dw_g||, h the block's input, where the second factor is a product of the norms of block
    Jacobians and one measured norm. Source: Theorem (thm:forms).
    """
    B, ends = walk.zeros.new_zeros(len(walk.groups), len(walk.groups)), [] if whole else cuts(walk.steps)
    above, first = walk.zeros, 0  # >= ||dh/dw_g|| of the block's input

    def reach(i, name, _, build):
        norms = walk.zeros

        def visit(g, matrix):
            norms[g] = spectral(matrix)

        rest = walk.back(build(), name, i, first, visit)
        if rest is not None and above.any():
            norms = norms + above * spectral(rest.flatten(1))
        return norms

    for last in [*ends, len(walk.steps) - 1]:
        functional(walk, reach, range(first, last + 1), B)
        if last in ends:
            name = walk.steps[last].output
            above, first = reach(last + 1, name, 1, lambda name=name: units(walk.values[name])), last + 1
    return B


def jets(walk: Walk) -> dict[str, Tensor]:
    """a (m,) >= ||dz/dw_g|| of every value z by name, by products of norms forward.

    LayerNorm is taken as one map, and so is attention from (Q, K, V) to O. Source: Theorem 1 (thm:jet), Lemma
    (lem:covariance).
    """
    found: dict[str, Tensor] = {}
    maker = {step.output: i for i, step in enumerate(walk.steps)}
    for i, step in enumerate(walk.steps):
        node, saved, a = step.node, walk.saved[i], [found.get(name, walk.zeros) for name in step.inputs]
        if isinstance(node, Linear):
            out = spectral(saved[1]) * a[0]
        elif isinstance(node, Score):  # softmax ignores what moves all keys together
            Q, K, scale = saved[0][0], saved[1][0], saved[2]  # Q has the scale in it
            out = scale * spectral(K - K.mean(1, keepdim=True)).max() * a[0] + spectral(Q).max() * a[1]
        elif isinstance(node, Softmax):
            out = softmax_first(saved[0]).max() * a[0]
        elif isinstance(node, Mixing):
            score = walk.steps[maker[walk.steps[maker[step.inputs[0]]].inputs[0]]]
            of_Q, of_K = _through_scores(*saved, *walk.saved[maker[score.output]])
            moved = [found.get(name, walk.zeros) for name in score.inputs]
            out = of_Q * moved[0] + of_K * moved[1] + spectral(saved[0][0]).max() * a[1]
        elif isinstance(node, Activation):
            out = saved[0].abs().max() * a[0]
        elif isinstance(node, Normalisation):
            out = saved[1].max() * a[0]  # 1/rho
        elif isinstance(node, Affine):
            norm = maker[step.inputs[0]]
            gains = torch.diag(saved[1])[:, None].expand(-1, *saved[0].shape[1:])  # (d, N, d)
            slopes = walk.steps[norm].node.adjoint(walk.saved[norm], gains)[0].transpose(0, 1)  # diag(gamma) Dn_t
            out = spectral(slopes).max() * found.get(walk.steps[norm].inputs[0], walk.zeros)
        elif isinstance(node, Add):
            out = a[0] + a[1]
        elif isinstance(node, Pool):
            out = a[0] / (math.sqrt(saved[0][1]) if node.kind == "mean" else 1)
        else:  # Embedding
            out = a[0]
        for group, norm in walk.norms_on_weights(i).items():
            if group in walk.groups:
                out = out + norm * (torch.arange(len(out), device=out.device) == walk.groups[group])
        found[step.output] = out
    return found


def _through_scores(A: Tensor, V: Tensor, Q: Tensor, K: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Norms of the maps dQ -> dO and dK -> dO of one sample, Q times scale; the smaller of two bounds each.

    Source: Lemma 5 (lem:bilinear), Lemma (lem:covariance).
    """
    spread_V, norms_K = (spectral(X - X.mean(-2, keepdim=True)).max() for X in (V, K))
    along = spread_V * softmax_first(A).max()
    _, sigma_V, both = (t.max() for t in covariances(A, K, V))
    rows = Q.norm(dim=-1).max() * A.sum(-2).max().sqrt()
    return scale * torch.minimum(along * norms_K, both), torch.minimum(along * spectral(Q).max(), rows * sigma_V)


def small_matrix(losses: curvature.Losses, row: int, groups: list[str], rung: str) -> tuple[Tensor, Tensor]:
    """A bound of ||H_i||, and the matrix (m, m) that bounds its blocks, for the sample `row`.

    ||H|| <= min(||J^T S J|| + ||B||, || ||blocks of J^T S J|| + B ||). Source: Theorem (thm:forms).
    """
    walk = Walk(losses, row, groups)
    whole, blocks = gauss_newton(walk)
    if rung == "adjoint":
        a, B = jets(walk), torch.zeros_like(blocks)
        functional(walk, lambda i, name, norm, _: norm * a[name], range(len(walk.steps)), B)
    else:
        B = measured_tangents(walk, rung == "tangents")
    top, other = torch.linalg.eigvalsh(torch.stack([B, blocks + B]))[:, -1]
    return torch.minimum(whole + top, other) * ROUNDING, (blocks + B) * ROUNDING


# --- the trace of a majorant (Theorem (thm:deflation)) ---------------------------------------------------


def _weight_trace(step: Step, saved, wanted, P: Tensor) -> Tensor | float:
    """tr(D_W^T P D_W) = <P, D_W D_W^T> over the weights W of a step, P (D, D) a form of its output."""
    if not isinstance(step.node, PARAMETRIC) or not any(wanted[1:]):
        return 0.0
    if isinstance(step.node, Linear):
        X, W, bias = saved
        gram = wanted[1] * (X[0] @ X[0].mT) + (1.0 if bias and wanted[2] else 0.0)  # [X 1][X 1]^T
        return (P.reshape(len(gram), len(W), len(gram), len(W)).diagonal(dim1=1, dim2=3).sum(-1) * gram).sum()
    if isinstance(step.node, Affine):
        X = saved[0][0]
        gram = wanted[1] * X[:, None] * X[None] + (1.0 if wanted[2] else 0.0)  # (N, N, d)
        return (P.reshape(*X.shape, *X.shape).diagonal(dim1=1, dim2=3) * gram).sum()
    d = saved[1][-1]
    return wanted[1] * P.trace() + (wanted[2] * P[:d, :d].trace() if saved[0] else 0.0)


def ridge_trace(walk: Walk) -> Tensor:
    """tr Q of the majorant with mu (part "ridge" of `calculus.Tape.product`), exactly, in one dense walk back.

    The walk carries the quadratic form of all later nodes on the values that are alive, P (dim, dim) for each pair of
    them; a step z = phi(x) turns it into D phi^T P D phi, adds |M_z|, and leaves <P, D_W D_W^T> behind at its weights.
    Cost: as many backward passes as the widest value has numbers, in matrix products. Source: Theorem (thm:deflation).
    """
    forms = walk.tape._majorants_of(ridge=True)
    P = {("f", "f"): forms[-1]((units(walk.values["f"]),), None)[0].flatten(1)}
    total = walk.values["f"].new_zeros(())

    def add(a, b, M):
        if (b, a) in P:
            P[b, a] = P[b, a] + M.mT
        else:
            P[a, b] = P[a, b] + M if (a, b) in P else M

    for i in reversed(range(len(walk.steps))):
        step, z = walk.steps[i], walk.steps[i].output
        if (z, z) not in P:
            continue
        own, shape = P.pop((z, z)), walk.values[z].shape[1:]
        mixed = {a if b == z else b: P.pop((a, b)).mT if a == z else P.pop((a, b)) for a, b in list(P) if z in (a, b)}
        total = total + _weight_trace(step, walk.saved[i], walk.wanted[i], own)
        parts = {name: part.flatten(1) for name, part in walk.pull(i, own.reshape(-1, *shape)).items()}
        for name, part in parts.items():
            for other, both in walk.pull(i, part.mT.reshape(-1, *shape)).items():
                if name <= other:
                    add(name, other, both.flatten(1))
        for alive, M in mixed.items():  # (dim alive, dim z)
            for name, part in walk.pull(i, M.reshape(-1, *shape)).items():
                part = part.flatten(1)
                add(alive, name, part + part.mT if alive == name else part)
        if forms[i] is not None:
            active = walk.active(i)
            sources = [step.inputs[0]] if isinstance(step.node, PARAMETRIC) else step.inputs
            if len(active) < len(sources):
                continue  # what does not move is coupled with nothing
            for k, name in active:
                E = units(walk.values[name])
                dz = tuple(E if n == name else E.new_zeros(len(E), *walk.values[n].shape[1:]) for n in sources)
                M = forms[i](dz, None)[k]
                if M is not None:
                    add(name, name, M.flatten(1))
    return total


def deflated(model, x, y, loss="cross_entropy", *, products=64, rounds=4, seed=0, **options) -> dict[str, Tensor]:
    """A deterministic bound of ||H_i||: H_i itself on a subspace, the trace of its majorant on what is left.

    With V (P, q) orthonormal, T = V^T H V, B = H V - V T, and Q, mu with -Q - mu <= H <= Q + mu,

        ||H|| <= || [[ ||T||, ||B|| ], [ ||B||, rest ]] ||,   rest = tr Q - tr V^T Q V + mu.

    Any V, mu > 0 and weights of the couplings give a bound; these are chosen to make it small: V spans `products`
    steps of Lanczos on Q from a random start, the rest by random probes. Returns (n,) tensors: "M", "lower" = ||T|| <=
    ||H||, "coupling" = ||B||, "rest", "trace" = tr Q + mu. Raises ValueError for networks that the calculus does not
    know. Cost: `products` products with Q and with H a sample, and `ridge_trace`. Source: Theorem (thm:deflation).
    """
    losses = curvature.Losses(model, x, y, loss, **options)
    if losses.steps is None:
        raise ValueError(
            "The deflated rung knows only the networks of utils.models, as they are: use the certified norm."
        )
    if products < 1 or rounds < 1:
        raise ValueError(f"products is {products} and rounds {rounds}: give numbers of at least 1.")
    groups = list(dict.fromkeys(map(group_of, losses.point)))
    parts = []
    with torch.no_grad():
        for rows in torch.arange(losses.n, device=losses.x.device).split(losses.chunk(3 * products + 8)):
            Q, H = curvature.SampleHessians(losses, rows, "ridge"), curvature.SampleHessians(losses, rows)
            probes = curvature.uniform_start((rounds, losses.P), losses, seed)[:, None].expand(-1, len(rows), -1)
            Q.mu = _coupling_trace(Q, probes).sqrt().clamp_min(LEAST)
            for v in probes:
                Q.balance(v)
            V, inside = _krylov(Q, probes[0], products)
            HV = torch.empty_like(V)  # (m, q, P)
            for here in torch.arange(V.shape[1], device=V.device).split(max(1, 32 // len(rows))):
                each = torch.arange(len(rows), device=V.device).repeat_interleave(len(here))
                HV[:, here] = H(V[:, here].flatten(0, 1), each).unflatten(0, (len(rows), -1))
            T = HV @ V.mT
            T = (T + T.mT) / 2
            trace = torch.zeros_like(inside)
            for j, row in enumerate(rows.tolist()):
                walk = Walk(losses, row, groups)
                walk.tape.mu, walk.tape.sigma = Q.mu[j : j + 1], {i: s[j : j + 1] for i, s in Q.sigma.items()}
                trace[j] = ridge_trace(walk)
            top = torch.linalg.eigvalsh(T).abs().amax(1)
            B = HV.baddbmm_(T, V, alpha=-1)
            parts.append(torch.stack([top, spectral(B), (trace - inside).clamp_min(0) + Q.mu, trace + Q.mu]))
    top, coupling, rest, trace = torch.cat(parts, 1) * ROUNDING
    M = (top + rest) / 2 + (((top - rest) / 2).square() + coupling.square()).sqrt()
    return {"M": M * ROUNDING, "lower": top / ROUNDING, "coupling": coupling, "rest": rest, "trace": trace}


def _coupling_trace(Q: curvature.SampleHessians, probes: Tensor) -> Tensor:
    """tr R^T R (m,) over all couplings with parameters, from random probes (r, m, P): R v is mu Q's part of them."""
    tape = Q._tape_of(torch.arange(len(Q.rows), device=Q.rows.device))
    total = 0.0
    for v in probes:
        tangents = tape.tangents(Q.losses.unflatten(v))
        for i, step in enumerate(tape._chain[:-1]):
            moved = tangents.get(step.inputs[0])
            if isinstance(step.node, (Linear, Affine)) and tape._wanted[i][1] and moved is not None:
                squares = step.node.ridge(tape._saved[i], tape.adjoints[step.output])((moved,), None)[0]
                total = total + (moved * squares).flatten(1).sum(1) / len(probes)
    return total + probes.new_zeros(len(Q.rows))


def _krylov(Q: curvature.SampleHessians, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal V (m, q, P) spanning the Krylov spaces of Q from `start` (m, P), and tr V^T Q V (m,).

    Where a space is exhausted the vectors that are missing are zero.
    """
    m, P = start.shape
    V, inside, v, least = start.new_zeros(m, min(steps, P), P), start.new_zeros(m), start, 0.0
    for j in range(V.shape[1]):
        length = v.norm(dim=1, keepdim=True)
        V[:, j] = torch.where(length > least, v / length.clamp_min(torch.finfo(v.dtype).tiny), 0.0)
        u = V[:, j].contiguous()
        v = Q(u)
        inside += (u * v).sum(1)
        least = 1e-10 * v.norm(dim=1, keepdim=True)
        curvature._orthogonalise(v, V[:, max(0, j - 1) : j + 1])  # Lanczos' recurrence
        length = v.norm(dim=1)
        curvature._orthogonalise(v, V[:, : j + 1])
        if (v.norm(dim=1) < 0.7 * length).any():  # a second time is enough, where much was taken away
            curvature._orthogonalise(v, V[:, : j + 1])
    return V, inside


# --- the majorant ---------------------------------------------------------------------------------------


def majorant(
    model, x, y, loss="cross_entropy", *, confidence=0.95, max_steps=60, rounds=12, seed=0, **options
) -> dict[str, Tensor]:
    """lambda_max(Q_i) >= ||H_i|| for the majorant Q_i = J^T S J + sum over nodes of |M_z| on the tangents.

    No products of norms: tangents and adjoints are exact, only the signs of the nodes' second-order forms are lost.
    The couplings are balanced in `rounds` power steps on Q_i from the gradient, then Lanczos runs `max_steps` products
    from a uniform start of a stream of its own. "lower" (n,) <= lambda_max(Q_i) always; "M" (n,) >= lambda_max(Q_i) for
    all samples together with probability `confidence` over that start (inf while too few steps say nothing).
    `options` are those of `curvature.Losses`. Cost: rounds + max_steps products a sample, each a fifth dearer than one
    with H_i. Source: Theorem (thm:majorant), Theorem (thm:lanczos) for positive semidefinite matrices.
    """
    losses = curvature.Losses(model, x, y, loss, **options)
    if losses.steps is None:
        raise ValueError("The majorant knows only the networks of utils.models, as they are: use the certified norm.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a number between 0 and 1.")
    failure, parts = (1 - confidence) / losses.n, []
    for rows in torch.arange(losses.n, device=losses.x.device).split(losses.chunk(max_steps + 4)):
        operator = curvature.SampleHessians(losses, rows, "majorant")
        v = operator.gradients()
        for _ in range(rounds):
            v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            operator.balance(v)
            v = operator(v)
        start = curvature.uniform_start((1, losses.P), losses, seed).expand(len(rows), -1)
        parts.append(curvature.lanczos(operator, start, max_steps=max_steps, done=lambda ritz, j: ritz.exhausted))
    high, steps, exhausted = (torch.cat([getattr(p, name) for p in parts]) for name in ("high", "steps", "exhausted"))
    epsilon = {q: curvature.lanczos_epsilon(q, losses.P, min(2 * failure, 0.999)) for q in set(steps.tolist())}
    eps = torch.tensor([epsilon[q] for q in steps.tolist()], dtype=torch.float64, device=high.device)
    M = torch.where(exhausted, high, torch.where(eps < 0.5, high / (1 - eps), torch.inf)) * ROUNDING
    return {"lower": high, "M": M, "steps": steps}
