"""Rigorous upper bounds on the spectral norm of every per-sample Hessian of a `ViT`.

The ladder, from the loosest and most general rung to the sharpest:

    closed_form   one formula in sizes and norms of the weights      (Theorem 2, thm:closed-form)
    prior         norms of the weights, one row for each group       (Theorem 1, thm:jet; ball: cor:ball)
    activations   the sample's own activations                       (Theorem 1, thm:jet; ball: cor:ball)
    adjoint, blocks, tangents, majorant, deflated                    the second-order forms at one point: `utils.forms`

Symbols follow the paper: N tokens, d width, H heads, d_h = d/H, K classes, `rho` the LayerNorm scale,
`Gamma` = max |gamma_j|, omega = ||[W b]||, `chi` a bound of ||[X 1]|| for LayerNorm rows X, R a radius.
||.|| is the spectral norm, |.| the Euclidean (Frobenius) norm. Weight and bias of one linear map are one
group [W b], so are gamma and beta of one LayerNorm. Everything is float64; each bound is a sum of products
of nonnegative numbers, so that rounding costs a relative 1e-11 at most and `ROUNDING` covers it. An
overflow gives inf, which is still a bound, or an error. The rounding of the measured activations is not covered.
Closed form and prior become much smaller with norms `measured_norms` over a data set (prop:measured). An `MLP` has the
rungs prior, activations (prop:connected) and majorant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from utils import calculus, curvature, forms
from utils.forms import ROUNDING, covariances, softmax_first
from utils.forms import spectral as _spectral
from utils.models import ACTIVATIONS, LOSSES, MLP, ViT, prepared_copy

JETS = ("closed_form", "prior", "activations")
RUNGS = (*JETS, *forms.SMALL_MATRIX, *forms.BY_PRODUCTS)

# --- lemmas: one node each --------------------------------------------------------------------------
# Decimal constants are rounded up.

SOFTMAX_FIRST = 0.5  # >= ||Ds||, attained at (1/2, 1/2, 0, ...). Source: Lemma 1 (lem:softmax)
SOFTMAX_SECOND = 0.2721656  # >= ||D^2 s||, sqrt(6)/9, attained. Source: Lemma 1 (lem:softmax)
CROSS_ENTROPY_FIRST = 1.4142136  # >= |p - e_y|, sqrt(2), a supremum. Source: Lemma 2 (lem:cross-entropy)
CROSS_ENTROPY_SECOND = 0.5  # >= ||diag p - p p^T||, attained. Source: Lemma 2 (lem:cross-entropy)
LAYER_NORM_SECOND = 1.1547006  # >= sqrt(d) rho^2 ||D^2 n||, 2/sqrt(3), attained. Source: Lemma 3 (lem:layernorm)
LAYER_NORM_UNIFORM = 0.8586502  # >= sqrt(d) eps ||D^2 n|| for every x, 48/(25 sqrt 5), attained. Source: Lemma 3
# name -> (>= |act'|, >= |act''|); |act(z)| <= |z| for each. ReLU: almost everywhere. Source: Lemma 4 (lem:activations)
ACTIVATION_BOUNDS = {"gelu": (1.12891, 0.79789), "gelu_tanh": (1.1290, 0.79789), "relu": (1.0, 0.0)}
ACTIVATION_THIRD = {"gelu": 0.77877, "gelu_tanh": 0.77670}  # name -> >= |act'''|. Source: Lemma 4 (lem:activations)


def softmax_second(first: Tensor) -> Tensor:
    """A bound of ||D^2 s|| from ||Ds||: min(sqrt(6)/9, sqrt(2) ||Ds||). Source: Lemma 1 (lem:softmax), part (ii)."""
    return (math.sqrt(2) * first).clamp(max=SOFTMAX_SECOND)


def softmax_moved(first: Tensor, moved: Tensor) -> Tensor:
    """>= ||Ds|| at logits within `moved` of those where it is `first`. Source: Lemma 1 (lem:softmax), part (iii)."""
    near = torch.minimum(first + SOFTMAX_SECOND * moved, first * (math.sqrt(2) * moved).exp())
    return near.nan_to_num(nan=math.inf).clamp(max=SOFTMAX_FIRST)


def cross_entropy_norms(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(|p - e_y|, ||diag p - p p^T||) of logits (n, K), both exact and accurate for well-fitted samples.

    Source: Lemma 2 (lem:cross-entropy).
    """
    log_p = f.log_softmax(-1)
    p = log_p.exp()
    wrong = p.scatter(-1, y[:, None], 0.0)
    return (wrong.sum(-1).square() + wrong.square().sum(-1)).sqrt(), softmax_first(p)


def layer_norm_norms(norm: nn.Module, h: Tensor) -> dict[str, Tensor]:
    """Norms of the derivatives of gamma n(h) + beta at the rows h (n, N, d), each (n,).

    `first` = max_t ||diag(gamma) Dn_t|| (exact), `second` >= max_t ||diag(gamma) D^2 n_t||, `own` the norm of
    (dgamma, dbeta) -> dX (exact), `mixed` the norm of (dgamma, dh) -> dgamma * Dn[dh] (exact).
    Source: Lemma 3 (lem:layernorm), with Dn Dn^T = (P - (2 - tau) y y^T / (d rho^2)) / rho^2, y = P h.
    """
    d = h.shape[-1]
    gamma = norm.weight
    y = h - h.mean(-1, keepdim=True)
    var = y.square().mean(-1)
    rho2 = var + norm.eps  # (n, N)
    tau = var / rho2
    # diag(gamma) Dn Dn^T diag(gamma), (n, N, d, d): symmetric, so one eigenvalue problem a token
    gy = gamma * y
    gram = torch.diag(gamma**2) - torch.outer(gamma, gamma) / d
    gram = gram - (((2 - tau) / (d * rho2))[..., None] * gy)[..., :, None] * gy[..., None, :]
    first = (_largest_eigenvalue(gram).clamp(min=0) / rho2).sqrt().amax(-1)
    second = gamma.abs().max() * _layer_norm_second(var, norm.eps).amax(-1) / math.sqrt(d)
    n = y / rho2.sqrt()[..., None]
    n2, n1, N = n.square().sum(1), n.sum(1), n.shape[1]  # per column: |n_j|^2, sum of n_j
    own = ((n2 + N) / 2 + (((n2 - N) / 2).square() + n1.square()).sqrt()).amax(-1).sqrt()
    rows = (1 - 1 / d - ((2 - tau) / (d * rho2))[..., None] * y.square()).amax(-1)
    return {"first": first, "second": second, "own": own, "mixed": (rows.clamp(min=0) / rho2).sqrt().amax(-1)}


def _layer_norm_second(var: Tensor, eps: float) -> Tensor:
    """sqrt(d) ||D^2 n|| at rows of variance `var`; it rises up to var = eps/4 and falls from there.

    Source: Lemma 3 (lem:layernorm), part (ii).
    """
    rho2 = var + eps
    tau = var / rho2
    shape = torch.where(tau <= 1 / 3, 1 - tau, 2 / (3 * (3 * tau).clamp(min=1).sqrt()))
    return 3 * tau.sqrt() * shape / rho2


def layer_norm_ball(norm: nn.Module, h: Tensor, moved: Tensor, R: float) -> tuple[dict[str, Tensor], Tensor]:
    """The numbers of `layer_norm_norms` for all rows within `moved` (n,) of h and gamma, beta within R, and the
    radius (n,) of the output. At moved = R = 0 those numbers themselves.

    The standard deviation of a row is 1/sqrt(d)-Lipschitz, so rho and the largest ||D^2 n|| on the ball are known
    exactly; the other norms move by ||D^2 n|| at most. Source: Corollary (cor:ball), part (ii).
    """
    at, d, Gamma = layer_norm_norms(norm, h), h.shape[-1], norm.weight.abs().max()
    sigma, step = (h - h.mean(-1, keepdim=True)).square().mean(-1).sqrt(), moved[:, None] / math.sqrt(d)
    low, high = (sigma - step).clamp(min=0).square(), (sigma + step).square()
    rho = (low + norm.eps).sqrt().amin(-1)
    worst = torch.minimum(torch.maximum(torch.full_like(low, norm.eps / 4), low), high)  # in [low, high], near eps/4
    second = _layer_norm_second(worst, norm.eps).nan_to_num(nan=math.inf).amax(-1) / math.sqrt(d)
    drift = torch.where(moved > 0, second * moved, 0.0)  # of Dn
    first = torch.fmin(at["first"] + R / rho + Gamma * drift, (Gamma + R) / rho)
    turned = _least(moved / rho, 2 * math.sqrt(h.shape[1] * d))  # of the rows n
    norms = {
        "first": first,
        "second": (Gamma + R) * second,
        "own": at["own"] + turned,
        "mixed": torch.fmin(at["mixed"] + drift, 1 / rho),
    }
    return norms, torch.fmin(first * moved, (Gamma + R) * turned) + R * at["own"]


def layer_norm_prior(norm: nn.Module, N: int, R: float = 0.0, floor: float | None = None) -> dict[str, float]:
    """The numbers of `layer_norm_norms` for every input of N rows and all weights within R.

    `rho` >= sqrt(eps), or >= `floor` where that is assumed. Source: Lemma 3 (lem:layernorm).
    """
    d, Gamma = norm.weight.numel(), float(norm.weight.abs().max()) + R
    rho, curvature = _rho_floor(norm.eps, floor)
    return {
        "first": Gamma / rho,
        "second": Gamma * curvature / math.sqrt(d),
        "own": math.sqrt(N * d),
        "mixed": 1 / rho,
    }


def _rho_floor(eps: float, floor: float | None) -> tuple[float, float]:
    """(lower bound of rho, upper bound of sqrt(d) ||D^2 n||). Source: Lemma 3 (lem:layernorm)."""
    rho = max(math.sqrt(eps), floor or 0.0)
    if rho == 0:
        raise ValueError("A LayerNorm has eps = 0, so no bound holds for every input: give variance_floor.")
    return rho, min(LAYER_NORM_SECOND / rho**2, LAYER_NORM_UNIFORM / eps if eps > 0 else math.inf)


# --- Theorem 1: the calculus of majorant jets ---------------------------------------------------------


@dataclass(frozen=True)
class Jet:
    """Majorant jet of a map of the weights: a[i, g] >= ||dz/dw_g||, B[i, g, g'] >= ||d^2 z/dw_g dw_g'||.

    a (n, m), B (n, m, m) for n samples and m groups; both norms are those of (multi)linear maps in Euclidean
    norms. Constants handed to the rules are floats or tensors (n,). Source: Theorem 1 (thm:jet).
    """

    a: Tensor
    B: Tensor

    @staticmethod
    def parameter(n: int, m: int, g: int, like: Tensor) -> Jet:
        """The jet of group g itself."""
        a = like.new_zeros(n, m)
        a[:, g] = 1.0
        return Jet(a, like.new_zeros(n, m, m))

    def __add__(self, other: Jet) -> Jet:
        return Jet(self.a + other.a, self.B + other.B)

    def linear(self, c) -> Jet:
        """The jet after a linear map of norm <= c."""
        return Jet(_over(c, 1) * self.a, _over(c, 2) * self.B)

    def smooth(self, first, second) -> Jet:
        """The jet after a map with ||D|| <= first, ||D^2|| <= second."""
        return Jet(_over(first, 1) * self.a, _over(first, 2) * self.B + _over(second, 2) * outer(self.a, self.a))

    @staticmethod
    def of(inputs: list[Jet], first: list, second: dict[tuple[int, int], object]) -> Jet:
        """The jet of a map of several inputs: `first` bounds its partial, `second` its second partial derivatives."""
        out = [jet.linear(c) for jet, c in zip(inputs, first, strict=True)]
        a, B = sum(j.a for j in out), sum(j.B for j in out)
        for (i, j), c in second.items():
            cross = outer(inputs[i].a, inputs[j].a)
            B = B + _over(c, 2) * (cross if i == j else cross + cross.mT)
        return Jet(a, B)

    def least(self, other: Jet, groups: list[int]) -> Jet:
        """The smaller entries of two jets of one map, where `other` leaves the parts of `groups` out."""
        rest = torch.ones(self.a.shape[-1], dtype=torch.bool, device=self.a.device)
        rest[groups] = False
        a = torch.where(rest, torch.fmin(self.a, other.a), self.a)
        return Jet(a, torch.where(rest & rest[:, None], torch.fmin(self.B, other.B), self.B))

    def times(self, other: Jet, norm_self, norm_other, form=1.0) -> Jet:
        """The jet of a bilinear z(X, Y), X = self, Y = other.

        |z(X, dY)| <= norm_self |dY|, |z(dX, Y)| <= norm_other |dX|, |z(dX, dY)| <= form |dX| |dY|.
        Source: Lemma 5 (lem:bilinear), Theorem 1 (thm:jet).
        """
        a = _over(norm_self, 1) * other.a + _over(norm_other, 1) * self.a
        B = _over(norm_self, 2) * other.B + _over(norm_other, 2) * self.B
        cross = outer(self.a, other.a)
        return Jet(a, B + _over(form, 2) * (cross + cross.mT))


def _over(c, dims: int):
    return c.reshape(c.shape + (1,) * dims) if isinstance(c, Tensor) and c.ndim else c


def outer(u: Tensor, v: Tensor) -> Tensor:
    return u[..., :, None] * v[..., None, :]


def _largest_eigenvalue(M: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(M)[..., -1]


def _hypot(u, v):
    """sqrt(u^2 + v^2) of floats or tensors, without overflow in between."""
    if not isinstance(u, Tensor) and not isinstance(v, Tensor):
        return math.hypot(u, v)
    like = u if isinstance(u, Tensor) else v
    return torch.hypot(*(torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in (u, v)))


def _least(u, v):
    """min(u, v) of floats or tensors; a NaN (0 times inf: nothing known) gives way."""
    like = u if isinstance(u, Tensor) else v
    if not isinstance(like, Tensor):
        return min(u, v)
    return torch.fmin(*(torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in (u, v)))


def _with_ones(X: Tensor) -> Tensor:
    return torch.cat([X, torch.ones_like(X[..., :1])], -1)


def _centred(X: Tensor) -> Tensor:
    """X minus its mean over the tokens (the second last axis)."""
    return X - X.mean(-2, keepdim=True)


def _joined(linear: nn.Linear) -> Tensor:
    return torch.cat([linear.weight, linear.bias[:, None]], 1)  # [W b]


def _omega(linear: nn.Linear, R: float = 0.0) -> float:
    return float(_spectral(_joined(linear))) + R


# --- the norms that Theorem 1 needs, from the weights (prior) or from the activations -----------------
# A dictionary for each network: "embed.X1", "blocks.0.attention.Q", ... -> float or (n,).


@dataclass(frozen=True)
class _Rows:
    """What is known of a matrix X of N rows for all inputs.

    row >= max_t |x_t|, full >= |X|, centred >= |X - mean over rows|, spread >= max_t |x_t - m| for some m.
    """

    N: int
    row: float | Tensor
    full: float | Tensor
    centred: float | Tensor
    spread: float | Tensor

    @property
    def X1(self):  # >= |[X 1]|
        return _hypot(self.full, math.sqrt(self.N))

    def some(self, N: int) -> _Rows:
        if N == self.N:
            return self
        return _Rows(N, self.row, math.sqrt(N) * self.row, math.sqrt(N) * self.row, self.spread)


def _layer_norm_rows(norm: nn.Module, N: int, R: float) -> _Rows:
    """|gamma n + beta| <= Gamma sqrt(d) + |beta|; beta is the same in every row. Source: Lemma 3 (lem:layernorm)."""
    spread = (float(norm.weight.abs().max()) + R) * math.sqrt(norm.weight.numel())
    row = spread + float(norm.bias.norm()) + R
    return _Rows(N, row, math.sqrt(N) * row, math.sqrt(N) * spread, spread)


def _per_head(linear: nn.Linear, H: int, bias: bool) -> Tensor:
    M = _joined(linear) if bias else linear.weight
    return _spectral(M.reshape(H, -1, M.shape[1]))  # (H,)


def _weight_norms(names: dict[str, nn.Linear], R: float) -> dict[str, float]:
    return {name: float(_spectral(linear.weight)) + R for name, linear in names.items()}


def _attention_weights(att: nn.Module, R: float) -> dict[str, float]:
    return _weight_norms({"W_Q": att.query, "W_K": att.key, "W_V": att.value, "W_O": att.out}, R)


def _attention_prior(att: nn.Module, X: _Rows, queries: _Rows, R: float) -> dict:
    """Norms of the attention nodes for all inputs. K and V centred over the tokens, O by heads.

    Rows of different heads may pick different tokens: |O|^2 <= N sum_h ||[W_Vh b_Vh]||^2 max_t |[x_t 1]|^2.
    The last norms are those of `_mixing`. Source: Lemma 5 (lem:bilinear), Lemma (lem:covariance).
    """
    H, root = att.n_heads, math.sqrt(queries.N)
    values = float(_per_head(att.value, H, True).norm()) + R
    key, value = (float(_per_head(m, H, False).max()) + R for m in (att.key, att.value))
    query = float(_per_head(att.query, H, True).max()) + R
    sigma_K, sigma_V = key * X.spread, value * X.spread
    return _attention_weights(att, R) | {
        "X1": X.X1,
        "X1_query": queries.X1,
        "X_centred": X.centred,
        "Q": query * queries.X1,
        "K": key * X.centred,
        "V": value * X.centred,
        "A": root,
        "columns": queries.N,
        "q": query * _hypot(queries.row, 1.0),
        "sigma_K": sigma_K,
        "sigma_V": sigma_V,
        "covariance": sigma_K * sigma_V,
        "reach": 2 * sigma_V,
        "softmax1": SOFTMAX_FIRST,
        "softmax2": SOFTMAX_SECOND,
        "O1": root * _hypot(values * _hypot(X.row, 1.0), 1.0),
    }


def _attention_data(att, X, queries, R=0.0, moved=0.0, moved_query=0.0, prior=None) -> tuple[dict, Tensor, dict]:
    """Norms of the attention nodes at X (n, N, d) and query rows (n, N_q, d), the output (n, N_q, d) and the radii.

    For all weights within R and inputs within `moved`; each norm is at most that of `prior` by the same name.
    Radii: name of the node -> its largest displacement (n,). Source: Corollary (cor:ball), part (ii).
    """
    H, d_h, W = att.n_heads, X.shape[-1] // att.n_heads, _attention_weights(att, R)
    at_most = _at_most(prior)

    def heads(z):  # (n, N, d) -> (n, H, N, d_h)
        return z.unflatten(-1, (H, d_h)).transpose(1, 2)

    Q, K, V = heads(att.query(queries)), heads(att.key(X)), heads(att.value(X))
    A = (Q @ K.mT / math.sqrt(d_h)).softmax(-1)  # (n, H, N_q, N)
    O = (A @ V).transpose(1, 2).flatten(2)
    X1, X1_query, centred = _spectral(_with_ones(X)), _spectral(_with_ones(queries)), _spectral(_centred(X))
    q, k, v = _spectral(Q).amax(1), _spectral(_centred(K)).amax(1), _spectral(_centred(V)).amax(1)
    O1 = _spectral(_with_ones(O))
    dQ = X1_query * R + W["W_Q"] * moved_query
    dK = centred * R + W["W_K"] * moved  # of the centred K, to which b_K adds nothing
    dV = X1 * R + W["W_V"] * moved
    Q_ball = at_most("Q", q + dQ)
    dT = (Q_ball * dK + k * dQ) / math.sqrt(d_h)
    first = at_most("softmax1", softmax_moved(softmax_first(A).amax((1, 2)), dT))
    dA = _least(first * dT, math.sqrt(2 * H * queries.shape[1]))
    V_ball = at_most("V", v + dV)
    sigma_K, sigma_V, covariance = covariances(A, K, V)
    far = torch.cdist(A @ V, V, compute_mode="donot_use_mm_for_euclid_dist").amax((1, 2, 3))
    reach = at_most("reach", far + 2 * dV + v * dA)
    stretch = (dT / math.sqrt(2)).exp()  # of a standard deviation, by the change of the rows alone
    spread_K = at_most("sigma_K", (sigma_K * stretch).nan_to_num(nan=math.inf) + dK)
    spread_V = at_most("sigma_V", (sigma_V * stretch).nan_to_num(nan=math.inf) + dV)
    covariance = covariance + dV * spread_K + spread_V * dK + reach * spread_K * dT / math.sqrt(2)
    norms = W | {
        "X1": at_most("X1", X1 + moved),
        "X1_query": at_most("X1_query", X1_query + moved_query),
        "X_centred": at_most("X_centred", centred + moved),
        "Q": Q_ball,
        "K": at_most("K", k + dK),
        "V": V_ball,
        "A": at_most("A", _spectral(A).amax(1) + dA),
        "columns": _least(A.sum(-2).amax((1, 2)) + math.sqrt(A.shape[-2]) * dA, A.shape[-2]),
        "q": at_most("q", Q.norm(dim=-1).amax((1, 2)) + dQ),
        "sigma_K": spread_K,
        "sigma_V": spread_V,
        "covariance": at_most("covariance", torch.fmin(covariance, spread_K * spread_V)),
        "reach": reach,
        "softmax1": first,
        "softmax2": softmax_second(first),
    }
    (by_Q, by_K, by_V), _ = _mixing(norms, d_h)
    dO = by_V * dV + _least(v * dA, by_Q * dQ + by_K * dK)
    norms["O1"] = at_most("O1", O1 + dO)
    out = O1 * R + W["W_O"] * dO
    return norms, att.out(O), {"Q": dQ, "K": dK, "V": dV, "T": dT, "A": dA, "O": dO, "out": out}


def _mixing(k: dict, d_h: int) -> tuple[tuple, dict]:
    """Bounds of the partial derivatives of (Q, K, V) -> O = softmax(Q K^T / sqrt(d_h)) V: first, and second by pair.

    Each is the smaller of two: along scores and rows (V softmax1 ...), or as covariances under the rows, which know
    that a row of A is a probability. Source: Lemma 5 (lem:bilinear), Lemma (lem:covariance).
    """
    s = 1 / math.sqrt(d_h)
    Q, K, V, one, two = s * k["Q"], s * k["K"], k["V"], k["softmax1"], k["softmax2"]
    q, root = s * k["q"], k["columns"] ** 0.5
    sigma_K, sigma_V, reach = s * k["sigma_K"], k["sigma_V"], k["reach"]
    first = (_least(V * one * K, s * k["covariance"]), _least(V * one * Q, q * sigma_V * root), k["A"])
    second = {
        (0, 0): _least(V * two * K * K, reach * sigma_K * sigma_K),
        (1, 1): _least(V * two * Q * Q, reach * q * q * root),
        (0, 1): _least(V * (two * Q * K + s * one), s * sigma_V + reach * q * sigma_K),
        (0, 2): _least(one * K, sigma_K),
        (1, 2): _least(one * Q, q * root),
    }
    return first, second


def _at_most(prior: dict | None):
    """(name, value) -> the smaller of the value and prior[name]."""
    return lambda name, value: _least(value, (prior or {}).get(name, math.inf))


def _mlp_prior(mlp: nn.Module, X: _Rows, R: float) -> dict:
    first, second = ACTIVATION_BOUNDS[mlp.activation]
    G1 = _hypot(_omega(mlp.fc1, R) * X.X1, math.sqrt(X.N))  # |act(z)| <= |z|
    return _mlp_weights(mlp, R) | {"X1": X.X1, "act1": first, "act2": second, "G1": G1}


def _mlp_weights(mlp: nn.Module, R: float) -> dict[str, float]:
    """||W_1||, ||W_2|| and ||W_2 W_1||."""
    W = _weight_norms({"W_1": mlp.fc1, "W_2": mlp.fc2}, R)
    moved = R * (W["W_1"] + W["W_2"])  # W_2' W_1' - W_2 W_1 = (W_2' - W_2) W_1' + W_2 (W_1' - W_1)
    return W | {"W_21": float(_spectral(mlp.fc2.weight @ mlp.fc1.weight)) + moved}


def _mlp_path(k: dict, activation: str):
    """>= ||W_2 diag(act') W_1||, from |act' - 1/2| <= c - 1/2 for the bound c of |act'|.

    Source: Lemma 4 (lem:activations), Lemma 5 (lem:bilinear).
    """
    away = ACTIVATION_BOUNDS[activation][0] - 0.5
    return _least(k["W_2"] * k["act1"] * k["W_1"], 0.5 * k["W_21"] + away * k["W_2"] * k["W_1"])


def _mlp_data(mlp: nn.Module, X: Tensor, R=0.0, moved=0.0, prior=None) -> tuple[dict, Tensor, dict]:
    """As `_attention_data`, for the two maps of the MLP."""
    W, at_most, Z = _mlp_weights(mlp, R), _at_most(prior), mlp.fc1(X)
    act1, act2 = (t.abs().amax((1, 2)) for t in calculus.activation_derivatives(mlp.activation, Z))
    if mlp.activation == "relu":  # at a kink the larger slope
        act1 = (Z >= 0).any(2).any(1).to(act1)
    G = ACTIVATIONS[mlp.activation](Z)
    X1, G1 = _spectral(_with_ones(X)), _spectral(_with_ones(G))
    dZ = X1 * R + W["W_1"] * moved
    limit1, limit2 = ACTIVATION_BOUNDS[mlp.activation]
    act1 = _least(act1 + limit2 * dZ, limit1)
    act2 = _least(act2 + ACTIVATION_THIRD.get(mlp.activation, 0.0) * dZ, limit2)
    dG = act1 * dZ
    norms = W | {"X1": at_most("X1", X1 + moved), "act1": act1, "act2": act2, "G1": at_most("G1", G1 + dG)}
    return norms, mlp.fc2(G), {"Z": dZ, "G": dG, "out": G1 * R + W["W_2"] * dG}


@dataclass(frozen=True)
class Measured:
    """Norms of the chain that hold for every sample of a data set and all weights within `radius`: name -> value."""

    values: dict[str, float]
    radius: float

    def least(self, name: str, value):
        return _least(value, self.values.get(name, math.inf))


# LayerNorm, softmax, attention rows, activation: what the nodes do to a tangent, not how large their values are
SLOPES = ("first", "second", "own", "mixed", "softmax1", "softmax2", "A", "columns", "act1", "act2")


@torch.no_grad()
def measured_norms(model: ViT, x: Tensor, radius: float = 0.0, names: tuple | None = SLOPES) -> Measured:
    """The largest norms of the chain over the samples x, for `measured` of `hessian_norm_bounds`: one forward pass.

    names: the last parts of the names to keep, None for every norm but those of the loss. With radius > 0 they hold on
    that ball, by the radii of the activations rung. Source: Proposition (prop:measured), Corollary (cor:ball).
    """
    y = torch.zeros(len(x), dtype=torch.long)
    _check(model, x, y, "cross_entropy", "activations", radius, None, None)
    if type(model) is not ViT:
        raise ValueError("Norms are measured for a ViT: an MLP's prior needs none.")
    twin = prepared_copy(model)
    x, y = x.to(twin.pos.device, torch.float64), y.to(twin.pos.device)
    found = {}
    for rows in torch.arange(len(x)).split(_chunk(twin)):
        for name, value in _data_norms(twin, x[rows], y[rows], "cross_entropy", radius).items():
            last, free = name.rsplit(".", 1)[-1], name.startswith("radius.") or name in ("r_hat", "S_hat")
            if not free and (names is None or last in names):
                found[name] = max(found.get(name, 0.0), float(_float64(value).max()))
    return Measured(found, radius)


def _chunk(model: nn.Module) -> int:
    """Samples at a time: keeps the tensors (samples, N, d, d) and (samples, H, N, N) near 100 MB."""
    c, m = model.config, len(_group_names(model))
    N, d, H = (len(model.pos), c.d_model, c.n_heads) if type(model) is ViT else (1, 1, 1)
    return max(1, int(1.2e7 / (N * d**2 + H * N**2 + 3 * m**2)))


def _named(prefix: str, norms: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in norms.items()}


def _prior_norms(model: ViT, x: Tensor, loss: str, R: float, floor: float | None, measured=None) -> dict:
    """Every norm of the chain from the norms of the weights (enlarged by R) and of the patches alone.

    None of them larger than the one that was `measured`, if any was. Source: Proposition (prop:measured).
    """
    c, N = model.config, len(model.pos)
    patches = _with_ones(model.patches(x))
    out = {"embed.X1": _spectral(patches)}
    # h0 = [cls ; patches] + pos: needed where attention reads h0 itself (post-norm)
    rows = _omega(model.embed, R) * patches.norm(dim=-1).amax(-1)
    full = _omega(model.embed, R) * patches.flatten(1).norm(dim=-1)
    if c.pool == "cls":
        cls = float(model.cls.norm()) + R
        rows, full = rows.clamp(min=cls), (full**2 + cls**2).sqrt()
    full = full + float(model.pos.norm()) + R
    rows = rows + float(model.pos.norm(dim=-1).max()) + R
    h = _Rows(N, rows, full, full, rows)
    for i, block in enumerate(model.blocks):
        N_q = 1 if c.pool == "cls" and i == c.depth - 1 else N
        p = f"blocks.{i}"
        out |= _named(f"{p}.norm1", layer_norm_prior(block.norm1, N if c.norm == "pre" else N_q, R, floor))
        if c.norm == "pre":
            out |= _named(f"{p}.norm1_query", layer_norm_prior(block.norm1, N_q, R, floor))
            h = _layer_norm_rows(block.norm1, N, R)
        out |= _named(f"{p}.attention", _attention_prior(block.attention, h, h.some(N_q), R))
        read = _layer_norm_rows(block.norm2 if c.norm == "pre" else block.norm1, N_q, R)
        out |= _named(f"{p}.mlp", _mlp_prior(block.mlp, read, R))
        out |= _named(f"{p}.norm2", layer_norm_prior(block.norm2, N_q, R, floor))
        h = _layer_norm_rows(block.norm2, N_q, R)
    if c.norm == "pre":
        out |= _named("norm", layer_norm_prior(model.norm, 1, R, floor))
        h = _layer_norm_rows(model.norm, 1, R)
    out["head.X1"] = _hypot(h.row, 1.0)  # a mean of rows is no longer than the longest
    out["head.W"] = float(_spectral(model.head.weight)) + R
    if measured is not None:
        out = {name: measured.least(name, value) for name, value in out.items()}
    return out | _loss_prior(_omega(model.head, R) * out["head.X1"], c.n_classes, loss)


def _loss_prior(f_max, K: int, loss: str) -> dict:
    """>= |r| and >= ||S|| for all logits with |f| <= f_max. Source: Lemma 2 (lem:cross-entropy)."""
    if loss == "cross_entropy":
        return {"r_hat": CROSS_ENTROPY_FIRST, "S_hat": CROSS_ENTROPY_SECOND}
    return {"r_hat": 2 / K * (f_max + 1), "S_hat": 2 / K}


def _data_norms(model: ViT, x: Tensor, y: Tensor, loss: str, R: float = 0.0) -> dict:
    """Every norm of the chain at the samples' own activations: one forward pass.

    With R > 0 for all weights within R: each node z carries a radius >= sup |z(w) - z(w0)| ("radius.<node>"), each
    norm grows by what the radii allow and is at most the prior's. Source: Corollary (cor:ball), part (ii).
    """
    c = model.config
    prior = _prior_norms(model, x, loss, R, None) if R > 0 and c.eps > 0 else {}
    patches = model.patches(x)
    out, radii = {"embed.X1": _spectral(_with_ones(patches))}, {}
    h = model.embed(patches)
    if c.pool == "cls":
        h = torch.cat([model.cls.expand(len(h), 1, -1), h], 1)
    h = h + model.pos  # (n, N, d)
    # [W_E b_E] and cls move different rows, pos all of them
    dh = radii["h0"] = R * _hypot(out["embed.X1"].clamp(min=1), 1.0)

    def part(prefix):
        return {k.removeprefix(f"{prefix}."): v for k, v in prior.items() if k.startswith(f"{prefix}.")}

    def layer_norm(norm, h, moved, key):
        norms, radius = layer_norm_ball(norm, h, moved, R)
        out.update(_named(key, {k: _at_most(part(key))(k, v) for k, v in norms.items()}))
        return norm(h), radius

    for i, block in enumerate(model.blocks):
        some = slice(0, 1) if c.pool == "cls" and i == c.depth - 1 else slice(None)
        p = f"blocks.{i}"
        X, dX, queries, dq = h, dh, h[:, some], dh
        if c.norm == "pre":
            X, dX = layer_norm(block.norm1, h, dh, f"{p}.norm1")
            queries, dq = layer_norm(block.norm1, h[:, some], dh, f"{p}.norm1_query")
            radii |= {f"{p}.X": dX, f"{p}.X_query": dq}
        norms, attended, moved = _attention_data(block.attention, X, queries, R, dX, dq, part(f"{p}.attention"))
        out |= _named(f"{p}.attention", norms)
        h, dh = h[:, some] + attended, dh + moved["out"]
        between, name = (block.norm2, "norm2") if c.norm == "pre" else (block.norm1, "norm1")
        X, dX = layer_norm(between, h, dh, f"{p}.{name}")
        radii |= _named(f"{p}.attention", moved) | {f"{p}.read": dX, f"{p}.middle": dh if c.norm == "pre" else dX}
        norms, added, moved = _mlp_data(block.mlp, X, R, dX, part(f"{p}.mlp"))
        out |= _named(f"{p}.mlp", norms)
        h, dh = (h, dh) if c.norm == "pre" else (X, dX)
        h, dh = h + added, dh + moved["out"]
        if c.norm == "post":
            h, dh = layer_norm(block.norm2, h, dh, f"{p}.norm2")
        radii |= _named(f"{p}.mlp", moved) | {f"{p}.h": dh}
    v, dv = (h[:, :1], dh) if c.pool == "cls" else (h.mean(1, keepdim=True), dh / math.sqrt(len(model.pos)))
    if c.norm == "pre":
        v, dv = layer_norm(model.norm, v, dv, "norm")
    X1 = _with_ones(v[:, 0]).norm(dim=-1)
    out |= {"head.X1": _at_most(prior)("head.X1", X1 + dv), "head.W": float(_spectral(model.head.weight)) + R}
    df = X1 * R + out["head.W"] * dv
    out |= {name: _at_most(prior)(name, value) for name, value in _loss_norms(model.head(v[:, 0]), y, loss, df).items()}
    return out | (_named("radius", radii | {"v": dv, "f": df}) if R > 0 else {})


def _loss_norms(f: Tensor, y: Tensor, loss: str, moved: Tensor) -> dict:
    """>= |r| and >= ||S|| at all logits within `moved` (n,) of f. Source: Lemma 2 (lem:cross-entropy), (cor:ball)."""
    K = f.shape[-1]
    if loss == "mse":
        target = torch.nn.functional.one_hot(y, K).to(f.dtype)
        return {"r_hat": 2 / K * ((f - target).norm(dim=-1) + moved), "S_hat": 2 / K}
    r, S = cross_entropy_norms(f, y)
    S = softmax_moved(S, moved)
    near = torch.fmin(r + S * moved, r * (math.sqrt(2) * moved).exp())
    return {"r_hat": near.clamp(max=CROSS_ENTROPY_FIRST), "S_hat": S}


# --- fully connected networks -------------------------------------------------------------------------


def _connected_norms(model: MLP, x: Tensor, y: Tensor, loss: str, rung: str, R: float) -> dict:
    """Every norm of the chain of an `MLP`, from the weights and |x| ("prior") or from the sample ("activations").

    For all weights within R. A layer without a bias reads x, not [x 1].
    Source: Proposition (prop:connected), Corollary (cor:ball).
    """
    name, out, X, moved = model.config.activation, {}, x.flatten(1), x.new_zeros(len(x))
    limit1, limit2 = (torch.full_like(moved, c) for c in ACTIVATION_BOUNDS[name])
    reads = _with_ones if model.config.bias else lambda X: X
    size = prior = reads(X).norm(dim=-1)  # >= |[x 1]|: at the sample, and for every sample of this |x|
    for i, layer in enumerate(model.layers):
        W, omega = (
            float(_spectral(layer.weight)) + R,
            R + float(_spectral(_joined(layer) if model.config.bias else layer.weight)),
        )
        out |= {f"layers.{i}.X1": prior if rung == "prior" else torch.minimum(prior, size + moved), f"layers.{i}.W": W}
        moved, f_max, X = size * R + W * moved, omega * prior, layer(X)
        if i + 1 == len(model.layers):
            break
        act1, act2 = (t.abs().amax(1) for t in calculus.activation_derivatives(name, X))
        if name == "relu":  # at a kink the larger slope
            act1 = (X >= 0).any(1).to(act1)
        act1 = torch.fmin(act1 + limit2 * moved, limit1)
        act2 = torch.fmin(act2 + ACTIVATION_THIRD.get(name, 0.0) * moved, limit2)
        act1, act2 = (limit1, limit2) if rung == "prior" else (act1, act2)
        out |= {f"layers.{i}.act1": act1, f"layers.{i}.act2": act2}
        X, moved = ACTIVATIONS[name](X), act1 * moved
        size, prior = reads(X).norm(dim=-1), _hypot(f_max, float(model.config.bias))  # |act(z)| <= |z|
    last = _loss_prior(f_max, X.shape[1], loss)
    if rung == "activations":
        last = {name: _least(value, last[name]) for name, value in _loss_norms(X, y, loss, moved).items()}
    return out | last


def _connected_jets(model: MLP, norms: dict, like: Tensor) -> dict[str, Jet]:
    """The jet of every node ("layers.0.Z", "layers.0.G", ..., "f"). Source: Proposition (prop:connected)."""
    n, m, nodes, G = len(like), len(model.layers), {}, None
    for i in range(m):
        k, own = (
            {part: norms.get(f"layers.{i}.{part}") for part in ("X1", "W", "act1", "act2")},
            Jet.parameter(n, m, i, like),
        )
        Z = own.linear(k["X1"]) if G is None else G.times(own, k["X1"], k["W"])
        if i + 1 == m:
            return nodes | {"f": Z}
        G = Z.smooth(k["act1"], k["act2"])
        nodes |= {f"layers.{i}.Z": Z, f"layers.{i}.G": G}


# --- Theorem 1 along the network ----------------------------------------------------------------------


def _group_names(model: nn.Module) -> list[str]:
    c = model.config
    if type(model) is MLP:
        return [f"layers.{i}" for i in range(len(model.layers))]
    names = ["embed"] + ["cls"] * (c.pool == "cls") + ["pos"]
    parts = ("norm1", "attention.query", "attention.key", "attention.value", "attention.out", "norm2", "mlp.fc1")
    names += [f"blocks.{i}.{part}" for i in range(c.depth) for part in (*parts, "mlp.fc2")]
    return names + ["norm"] * (c.norm == "pre") + ["head"]


def _jets(model: ViT, norms: dict, like: Tensor) -> dict[str, Jet]:
    """The jet of every node ("h0", "blocks.0.attention.Q", ..., "f") from the norms of the chain.

    like: any tensor (n, ...), for the number of samples, dtype and device. Source: Theorem 1 (thm:jet).
    """
    c, names = model.config, _group_names(model)
    n, m, nodes = len(like), len(_group_names(model)), {}
    d_h = c.d_model // c.n_heads

    def own(group):
        return Jet.parameter(n, m, names.index(group), like)

    def linear(X, group, X1, W):  # [X 1] [W b]^T
        return X.times(own(group), X1, W)

    def layer_norm(h, group, key):
        k = {part: norms[f"{key}.{part}"] for part in ("first", "second", "own", "mixed")}
        cross = h.times(own(group), 0.0, 0.0, k["mixed"])
        return h.smooth(k["first"], k["second"]) + own(group).linear(k["own"]) + cross

    def attention(X, queries, p):
        k = {key[len(p) + 1 :]: value for key, value in norms.items() if key.startswith(p + ".")}
        Q = linear(queries, f"{p}.query", k["X1_query"], k["W_Q"])
        K = linear(X, f"{p}.key", k["X_centred"], k["W_K"])
        V = linear(X, f"{p}.value", k["X1"], k["W_V"])
        T = Q.times(K, k["Q"], k["K"]).linear(1 / math.sqrt(d_h))
        A = T.smooth(k["softmax1"], k["softmax2"])
        mixed = Jet.of([Q, K, V], *_mixing(k, d_h))
        out = linear(mixed, f"{p}.out", k["O1"], k["W_O"])
        nodes.update(_named(p, {"Q": Q, "K": K, "V": V, "T": T, "A": A, "O": mixed, "out": out}))
        return out

    def mlp(X, p):
        k = {key[len(p) + 1 :]: value for key, value in norms.items() if key.startswith(p + ".")}
        Z = linear(X, f"{p}.fc1", k["X1"], k["W_1"])
        G = Z.smooth(k["act1"], k["act2"])
        out = linear(G, f"{p}.fc2", k["G1"], k["W_2"])
        through = X.smooth(_mlp_path(k, c.activation), k["W_2"] * k["act2"] * k["W_1"] ** 2)  # weights fixed
        out = out.least(through, [names.index(f"{p}.fc1"), names.index(f"{p}.fc2")])
        nodes.update(_named(p, {"Z": Z, "G": G, "out": out}))
        return out

    h = own("embed").linear(norms["embed.X1"]) + own("pos")
    if c.pool == "cls":
        h = h + own("cls")
    nodes["h0"] = h
    for i in range(c.depth):
        p = f"blocks.{i}"
        if c.norm == "pre":
            X = layer_norm(h, f"{p}.norm1", f"{p}.norm1")
            queries = layer_norm(h, f"{p}.norm1", f"{p}.norm1_query")
            h = h + attention(X, queries, f"{p}.attention")
            read = layer_norm(h, f"{p}.norm2", f"{p}.norm2")
            nodes.update(_named(p, {"X": X, "X_query": queries, "middle": h, "read": read}))
            h = h + mlp(read, f"{p}.mlp")
        else:
            h = layer_norm(h + attention(h, h, f"{p}.attention"), f"{p}.norm1", f"{p}.norm1")
            nodes[f"{p}.middle"] = h
            h = layer_norm(h + mlp(h, f"{p}.mlp"), f"{p}.norm2", f"{p}.norm2")
        nodes[f"{p}.h"] = h
    v = h if c.pool == "cls" else h.linear(1 / math.sqrt(len(model.pos)))
    if c.norm == "pre":
        v = layer_norm(v, "norm", "norm")
    return nodes | {"v": v, "f": linear(v, "head", norms["head.X1"], norms["head.W"])}


def _growth(model: nn.Module, norms: dict, n: int) -> Tensor:
    """>= ||dh_{l+1}/dh_l|| for each block (of an MLP: hidden layer), (n, L): what multiplies the jets."""
    c, out = model.config, []
    if type(model) is MLP:
        out = [norms[f"layers.{i}.act1"] * norms[f"layers.{i}.W"] for i in range(len(model.layers) - 1)]
        return torch.stack(out, 1).cpu()
    for i in range(c.depth):
        k = {key.removeprefix(f"blocks.{i}."): value for key, value in norms.items() if key.startswith(f"blocks.{i}.")}
        a = {key.removeprefix("attention."): value for key, value in k.items() if key.startswith("attention.")}
        m = {key.removeprefix("mlp."): value for key, value in k.items() if key.startswith("mlp.")}
        (by_Q, by_K, by_V), _ = _mixing(a, c.d_model // c.n_heads)
        att = a["W_O"] * (by_Q * a["W_Q"] + by_K * a["W_K"] + by_V * a["W_V"])
        mlp = _mlp_path(m, c.activation)
        if c.norm == "pre":
            G = (1 + att * k["norm1.first"]) * (1 + mlp * k["norm2.first"])
        else:
            G = k["norm1.first"] * (1 + att) * k["norm2.first"] * (1 + mlp)
        out.append(torch.as_tensor(G, dtype=torch.float64).cpu().expand(n))
    return torch.stack(out, 1) if out else torch.zeros(n, 0, dtype=torch.float64)


# --- Theorem 2: the closed form -----------------------------------------------------------------------


@torch.no_grad()
def closed_form(
    model: ViT,
    x: Tensor,
    radius: float = 0.0,
    variance_floor: float | None = None,
    measured: Measured | None = None,
) -> dict[str, Tensor]:
    """Every quantity of the closed form for a pre-norm ViT with cross-entropy; "M" (n,) bounds ||H_i||.

    model (pre-norm) and x (n, C, S, S) in float64, not checked here; all weights within `radius` of the model's.
    `hessian_norm_bounds` checks and converts. D bounds the first and E the second
    derivative of the running node jointly over all weights; P = growth by the residual path, C = what a
    sublayer adds to E. M = D^2/2 + sqrt(2) E at the logits. Values are float64 (n,) or floats;
    "growth" (L,) is P_att P_mlp of each block. `variance_floor`, `measured`: see `hessian_norm_bounds`; with
    `measured` Gamma and beta are those of each LayerNorm, not the largest, and the coefficients of mixing and of the
    MLP the smaller ones of `_mixing` and `_mlp_path`.
    Source: Theorem 2 (thm:closed-form), Corollary (cor:ball), Proposition (prop:measured).
    """
    c, R = model.config, radius
    d, N, H, d_h = c.d_model, len(model.pos), c.n_heads, c.d_model // c.n_heads
    s, unknown = 1 / math.sqrt(d_h), math.inf
    norms = [m for b in model.blocks for m in (b.norm1, b.norm2)] + [model.norm]
    rho, curvature = _rho_floor(c.eps, variance_floor)
    least = (lambda name, value: value) if measured is None else measured.least

    def layer_norm(key, those, rows):  # l1, l2, |own|, x2, Gamma sqrt(d), |[X_t 1]|
        Gamma = max(float(m.weight.abs().max()) for m in those) + R
        row1 = math.hypot(Gamma * math.sqrt(d) + max(float(m.bias.norm()) for m in those) + R, 1.0)
        l1, l2 = least(f"{key}.first", Gamma / rho), least(f"{key}.second", Gamma * curvature / math.sqrt(d))
        mixed, own = least(f"{key}.mixed", 1 / rho), least(f"{key}.own", math.sqrt(rows * d))
        return l1, l2, own, l2 + mixed, Gamma * math.sqrt(d), row1

    l1, l2, own, x2, spread, row1 = layer_norm("", norms, N)
    D = (_with_ones(model.patches(x)).flatten(1).square().sum(-1) + 1).sqrt()
    E = torch.zeros_like(D)
    out = {"chi": math.sqrt(N) * row1, "rho": rho, "Gamma": spread / math.sqrt(d), "l1": l1, "l2": l2}
    out |= {"x1": math.hypot(l1, own), "x2": x2, "D0": D}
    growth = []

    def sublayer(D, E, P, own, C):
        return _hypot(P * D, own), P * E + C * D.square().clamp(min=1)

    for i, block in enumerate(model.blocks):
        att, mlp, p = block.attention, block.mlp, f"blocks.{i}"
        own_norm = norms if measured is None else [block.norm1]
        l1, _, own, x2, spread, row1 = layer_norm(f"{p}.norm1", own_norm, N)
        chi, xhat = math.sqrt(N) * row1, max(math.hypot(l1, own), 1.0)
        wQ, wK, wV, wO = (_omega(m, R) for m in (att.query, att.key, att.value, att.out))
        q, k, v = (math.hypot(w, chi) for w in (wQ, wK, wV))
        t1, t2 = s * chi * (wK * q + wQ * k), s * (chi * (wK + wQ) + 2 * q * k)
        sizes = {"Q": wQ * chi, "K": wK * chi, "V": wV * chi, "q": unknown, "reach": unknown, "columns": float(N)}
        sizes |= {"softmax1": SOFTMAX_FIRST, "softmax2": SOFTMAX_SECOND, "A": math.sqrt(N)}
        sizes |= dict.fromkeys(("sigma_K", "sigma_V", "covariance"), unknown)
        if measured is not None:
            a, b = wK * spread, wV * spread
            sizes |= {"q": wQ * row1, "sigma_K": a, "sigma_V": b, "covariance": a * b, "reach": 2 * b}
        sizes = {name: least(f"{p}.attention.{name}", value) for name, value in sizes.items()}
        (by_Q, by_K, by_V), pairs = _mixing(sizes, d_h)
        o1 = by_Q * q + by_K * k + by_V * v
        first = (q, k, v)
        o2 = by_Q + by_K + by_V + sum((1 + (i != j)) * c * first[i] * first[j] for (i, j), c in pairs.items())
        y1, y2 = math.hypot(wO * o1, math.sqrt(H) * wV * chi, math.sqrt(N)), wO * o2 + o1
        lam_att = wO * (by_Q * wQ + by_K * wK + by_V * wV)
        P_att, C_att = 1 + lam_att * l1, y1 * x2 + y2 * xhat * xhat
        D, E = sublayer(D, E, P_att, y1 * own, C_att)

        own_norm = norms if measured is None else [block.norm2]
        l1, _, own, x2, _, row1 = layer_norm(f"{p}.norm2", own_norm, N)
        chi, xhat = math.sqrt(N) * row1, max(math.hypot(l1, own), 1.0)
        w1, w2 = _omega(mlp.fc1, R), _omega(mlp.fc2, R)
        act1, act2 = (least(f"{p}.mlp.act{j + 1}", ACTIVATION_BOUNDS[c.activation][j]) for j in (0, 1))
        z1 = math.hypot(w1, chi)
        g1, g2 = act1 * z1, act1 + act2 * z1 * z1
        m1, m2 = math.hypot(w2 * g1, w1 * chi, math.sqrt(N)), w2 * g2 + g1
        product = unknown if measured is None else _mlp_weights(mlp, R)["W_21"]
        lam_mlp = _mlp_path({"W_1": w1, "W_2": w2, "W_21": product, "act1": act1}, c.activation)
        P_mlp, C_mlp = 1 + lam_mlp * l1, m1 * x2 + m2 * xhat * xhat
        D, E = sublayer(D, E, P_mlp, m1 * own, C_mlp)
        growth.append(P_att * P_mlp)
        names = ("t1", "t2", "o1", "o2", "y1", "y2", "z1", "g1", "g2", "m1", "m2", "P_att", "C_att", "P_mlp", "C_mlp")
        values = (t1, t2, o1, o2, y1, y2, z1, g1, g2, m1, m2, P_att, C_att, P_mlp, C_mlp)
        out |= _named(p, dict(zip(names, values, strict=True)) | {"D": D, "E": E})
    if c.pool == "mean":
        D, E = D / math.sqrt(N), E / math.sqrt(N)
    l1, _, own, x2, _, row1 = layer_norm("norm", norms if measured is None else [model.norm], 1)
    D, E = _hypot(l1 * D, own), l1 * E + x2 * D.square().clamp(min=1)
    w_h = _omega(model.head, R)
    D, E = _hypot(w_h * D, row1), w_h * E + D.clamp(min=1)
    gauss_newton, functional = CROSS_ENTROPY_SECOND * D**2, CROSS_ENTROPY_FIRST * E
    growth = torch.tensor(growth, dtype=torch.float64)
    return out | {
        "growth": growth,
        "D": D,
        "E": E,
        "gauss_newton": gauss_newton,
        "functional": functional,
        "M": gauss_newton + functional,
    }


# --- exact and derived cases ---------------------------------------------------------------------------


def head_norms(model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> Tensor:
    """||H_i|| (n,) of the Hessian in the head alone, exactly: ||S|| (|v|^2 + 1), v what the head reads.

    The logits are linear in [W b], so there is no second-order part. Source: Corollary (cor:head).
    """
    _check(model, x, y, loss, "activations", 0.0, None, None)
    if type(model) is not ViT:
        raise ValueError("The head alone is known for a ViT: choose the last layer of an MLP with `parameters`.")
    twin = prepared_copy(model)
    with torch.no_grad():
        norms = _data_norms(twin, x.to(next(twin.parameters()).device, torch.float64), y, loss)
        return _float64(norms["S_hat"]).expand(len(x)) * _float64(norms["head.X1"]).square()


def lora(norm_adapted: float, gradient_norms, adapters, scale: float = 1.0, others: bool = False) -> float:
    """Bound of the Hessian in low-rank adapters W_j = W_j0 + scale B_j A_j, from that in the W_j themselves.

    norm_adapted >= ||H|| in the adapted matrices (and, with `others`, whatever else is trained); gradient_norms:
    ||dl/dW_j|| (spectral) for each j; adapters: pairs (A_j (r, in), B_j (out, r)).
    max_j scale^2 (||A_j||^2 + ||B_j||^2) norm_adapted + max_j scale ||dl/dW_j||, the factor at least 1 with `others`.
    Source: Lemma (lem:lora).
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: give a finite number > 0 (its sign can go into B).")
    factor = max(scale**2 * float(_spectral(A) ** 2 + _spectral(B) ** 2) for A, B in adapters)
    factor = max(factor, 1.0) if others else factor
    return (factor * norm_adapted + scale * max(map(float, gradient_norms))) * ROUNDING


# --- published constants ----------------------------------------------------------------------------------


def closing_the_curvature_gap(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, target: Tensor) -> float:
    """The constant of Petrov et al., arXiv 2510.16927, theorem 1, as printed: NOT a bound.

    Single-head attention softmax(X W_Q W_K^T X^T / sqrt(d_K)) X W_V, X (L, d_V), loss |F - target|^2 / (L d_V),
    parameters W_Q, W_K (d_V, d_K), W_V (d_V, d_V). Its proof takes 1/L for the norm of the softmax's Jacobian, which
    holds for uniform attention only. Counterexample: Remark (rem:published).
    """
    L, d_V, d_K = len(X), X.shape[1], W_K.shape[1]
    x, q, k, v = (float(_spectral(M)) for M in (X, W_Q, W_K, W_V))
    rho, m, root = L * x * v + float(_spectral(target)), math.sqrt(min(L, d_V)), math.sqrt(d_K)
    VV = 2 * L / d_V * x**2
    QQ = 8 / (L**3 * d_V * d_K) * k**2 * v**2 * x**6 + 12 / (d_V * d_K) * m * rho * v * k**2 * x**5
    VQ = 4 / (L * d_V * root) * v * k * x**4 + 4 * m / (L**2 * root) * rho * k * x**3
    QK = 8 / (L**3 * d_V * d_K) * k * q * v**2 * x**6
    QK += 4 * m * rho / (L * d_V * root) * v * (3 * L * k * q * x**5 + d_V / L * x**3)
    return 3 * max(VV, QQ, VQ, QK)


def unraveling_the_hessian(weights: list[Tensor], x: Tensor) -> Tensor:
    """The constant (n,) of Kiselev, Grabovoy, arXiv 2409.11995, theorem 1, as printed: NOT a bound.

    ReLU network without biases with the weight matrices `weights`, inputs x (n, d), cross-entropy. It leaves the
    functional part out and has a factor ||W|| too many, so that it falls to 0 with the weights while the norm does
    not. Counterexample: Remark (rem:published).
    """
    depth, M_W = len(weights), max(float(_spectral(W)) for W in weights)
    powers = sum(M_W ** (2 * p) for p in range(depth))  # (M_W^{2L} - 1) / (M_W^2 - 1)
    return math.sqrt(2) * (depth * x.flatten(1).square().sum(1) * M_W ** (2 * depth) + M_W**2 * powers)


# --- the public face ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Upper bounds of per-sample Hessian norms.

    values (n,): values[i] >= ||H_i||, float64 on the CPU. groups: names of the m groups of weights. blocks
    (n, m, m): blocks[i, g, g'] >= ||the (g, g') block of H_i||, and values[i] is at most its spectral norm (None for
    the closed form and the rungs by products). terms: the named quantities behind it (float64 tensors), "log10" = log10
    of the values; for the rungs by products what `forms.majorant` and `forms.deflated` return; for the first three
    "D" and "E" >= the norms of the first and second derivative of the logits, "growth" (n, L) the factor of each block
    and, but for the closed form, "r_hat" and "S_hat" >= the norms of the loss's gradient and Hessian in the logits.
    """

    rung: str
    values: Tensor
    groups: list[str]
    blocks: Tensor | None
    terms: dict[str, Tensor]


def hessian_norm_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    rung: str = "activations",
    radius: float = 0.0,
    parameters: list[str] | None = None,
    variance_floor: float | None = None,
    measured: Measured | None = None,
    **options,
) -> Bound:
    """Bound ||H_i||, the spectral norm of the Hessian in the weights of sample i's loss, for each sample.

    model: a `utils.models.ViT` or `MLP` (not the closed form), left unchanged. x: inputs (n, ...), y: classes
    (n,). loss:
    "cross_entropy" or "mse" (mean over the classes). rung: "closed_form" (pre-norm with cross-entropy, all
    weights), "prior" (norms of weights and patches), "activations" (one forward pass; the sample's own LayerNorm
    scales, attention rows, activation slopes and residual), "adjoint", "blocks", "tangents" (`forms.small_matrix`),
    "majorant" or "deflated" (`forms.majorant`, `forms.deflated`, whose `options` they take). The majorant holds with
    probability `confidence`, 0.95 if none is given; all others always.
    radius: with radius > 0 the values hold for all weights within that Euclidean distance of the model's, all
    groups moving together (the first three rungs). parameters: name patterns (fnmatch) that select the weights; a
    group counts as a whole if one of its parameters matches, which can only enlarge the bound (but in the rungs by
    products, which take the parameters that match).
    variance_floor: an ASSUMED lower bound of every LayerNorm's rho = sqrt(variance + eps) at every token of every
    sample and for all weights of the ball (closed_form and prior). Nothing here checks it, and where it fails
    the values need not be bounds; without it rho >= sqrt(eps), which always holds.
    measured: norms of the chain from `measured_norms`, in place of larger ones (closed_form and prior): the values are
    then bounds for the samples that were measured, within the radius of the measurement.
    ReLU: the Hessian exists almost everywhere only, and the values bound it there.

    Raises ValueError for another module, a rung that does not apply, a ReLU ball, or patterns without a match.
    Source: Theorem 1 (thm:jet), Theorem 2 (thm:closed-form), Corollary (cor:ball), Lemmas 1-5 (lem:softmax,
    lem:cross-entropy, lem:layernorm, lem:activations, lem:bilinear).
    """
    _check(model, x, y, loss, rung, radius, parameters, variance_floor)
    _check_measured(measured, model, rung, radius)
    if options and rung not in forms.BY_PRODUCTS:
        raise ValueError(f"Rung {rung!r} takes no {', '.join(options)}: leave it out or choose the rung 'majorant'.")
    twin = prepared_copy(model)
    device = next(twin.parameters()).device
    x, y = x.to(device, torch.float64), y.to(device)
    groups = _group_names(twin)
    if rung in forms.BY_PRODUCTS:
        by_products = forms.majorant if rung == "majorant" else forms.deflated
        found = by_products(model, x, y, loss, parameters=parameters, **options)
        terms = {name: _float64(t) for name, t in found.items()}
        values = terms.pop("M")
        kept = [groups[g] for g in _kept(twin, groups, parameters)]
        return Bound(rung, values, kept, None, terms | {"log10": values.log10()})
    if rung in forms.SMALL_MATRIX:
        kept = [groups[g] for g in _kept(twin, groups, parameters)]
        names = [name for name, _ in twin.named_parameters() if forms.group_of(name) in kept]
        losses = curvature.Losses(twin, x, y, loss, parameters=names)
        with torch.no_grad():
            parts = [forms.small_matrix(losses, i, kept, rung) for i in range(len(x))]
        values, blocks = (_float64(torch.stack(t)) for t in zip(*parts))
        return Bound(rung, values, kept, blocks, {"log10": values.log10()})
    with torch.no_grad():
        if rung == "closed_form":
            terms = {
                name: _float64(value) for name, value in closed_form(twin, x, radius, variance_floor, measured).items()
            }
            values = _never_nan(terms.pop("M") * ROUNDING)
            terms["growth"] = terms["growth"].expand(len(values), -1)
            return Bound(rung, values, groups, None, terms | {"log10": values.log10()})
        keep = _kept(twin, groups, parameters)
        parts = [
            _small_matrix(twin, x[rows], y[rows], loss, rung, radius, variance_floor, measured, keep)
            for rows in torch.arange(len(x)).split(_chunk(twin))
        ]
    blocks = torch.cat([part[0] for part in parts])
    terms = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    values = _norm_of_nonnegative(blocks)
    return Bound(rung, values, [groups[g] for g in keep], blocks, terms | {"log10": values.log10()})


def _small_matrix(model, x, y, loss, rung, radius, floor, measured, keep) -> tuple[Tensor, dict[str, Tensor]]:
    """||H_l|| <= || r_hat B_f + S_hat a_f a_f^T ||, entry by entry. Source: Theorem 1 (thm:jet)."""
    if type(model) is MLP:
        norms = _connected_norms(model, x, y, loss, rung, radius)
    elif rung == "prior":
        norms = _prior_norms(model, x, loss, radius, floor, measured)
    else:
        norms = _data_norms(model, x, y, loss, radius)
    f = (_connected_jets if type(model) is MLP else _jets)(model, norms, x)["f"]
    r, S = (_float64(norms[name]).expand(len(x)) for name in ("r_hat", "S_hat"))
    a, B = f.a[:, keep].cpu(), f.B[:, keep][:, :, keep].cpu()
    blocks = _never_nan((_over(r, 2) * B + _over(S, 2) * outer(a, a)) * ROUNDING)
    terms = {name: _float64(value).expand(len(x)) for name, value in norms.items()}
    D, E = _never_nan(a).norm(dim=-1), _norm_of_nonnegative(_never_nan(B))
    return blocks, terms | {"D": D, "E": E, "growth": _growth(model, norms, len(x))}


def loss_upper_bound(model: nn.Module, radius: float = 0.0) -> float:
    """C with 0 <= cross-entropy <= C for every input and all weights within `radius` of the model's.

    C = ln K + sqrt(2) omega_h chi_1, chi_1^2 = (Gamma sqrt(d) + |beta|)^2 + 1 for the LayerNorm that the head
    reads, because |f| <= omega_h chi_1 and l <= ln K + max_c f_c - f_y. Holds for ReLU too. Raises ValueError
    for another module than a `utils.models.ViT`. Source: (eq:loss-bound).
    """
    _check_model(model, (ViT,))
    _check_radius(radius)
    twin = prepared_copy(model)
    if twin.config.norm == "post" and twin.config.depth == 0:
        raise ValueError("A post-norm ViT without blocks has no LayerNorm before its head: give it depth 1 or more.")
    with torch.no_grad():
        rows = _layer_norm_rows(twin.norm if twin.config.norm == "pre" else twin.blocks[-1].norm2, 1, radius)
        chi_1 = math.sqrt(rows.row**2 + 1)
        return (math.log(twin.config.n_classes) + CROSS_ENTROPY_FIRST * _omega(twin.head, radius) * chi_1) * ROUNDING


def _check_model(model: nn.Module, kinds: tuple = (ViT, MLP)) -> None:
    if type(model) not in kinds or not calculus.known(model):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"The analytic bounds know only utils.models.{names} as they are, not this {type(model).__name__}: "
            "use the certified measured norm, which applies to any module."
        )


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius is {radius}: give a finite number >= 0.")


def check_samples(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """ValueError unless x, y are inputs and classes of the model, and all numbers finite."""
    c = model.config
    shape = (c.d_in,) if type(model) is MLP else (c.channels, c.image_size, c.image_size)
    inputs = x.flatten(1).shape[1:] if type(model) is MLP and x.ndim else x.shape[1:]
    if tuple(inputs) != shape or x.shape[0] == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: give inputs (n, {', '.join(map(str, shape))}) "
            "and one class each."
        )
    if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < c.n_classes:
        raise ValueError(f"y has to hold integer classes from 0 to {c.n_classes - 1}: map the labels to them.")
    if not all(bool(t.isfinite().all()) for t in (x, *model.parameters())):
        raise ValueError("The images or the weights hold NaN or infinity: remove them and run again.")


def _check(model, x, y, loss, rung, radius, parameters, floor) -> None:
    _check_model(model)
    _check_radius(radius)
    c = model.config
    if rung not in RUNGS:
        raise ValueError(f"rung is {rung!r}: choose one of {', '.join(RUNGS)}.")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")
    check_samples(model, x, y)
    if type(model) is MLP and (rung == "closed_form" or floor is not None):
        raise ValueError("An MLP has no closed form and no LayerNorm: use rung 'prior' without variance_floor.")
    if rung == "closed_form" and (c.norm != "pre" or loss != "cross_entropy"):
        raise ValueError(
            f"The closed form holds for pre-norm and cross-entropy, not {c.norm}-norm with {loss}: use rung 'prior'."
        )
    if rung == "closed_form" and parameters is not None:
        raise ValueError("The closed form covers all weights together: use rung 'prior' with parameters.")
    if radius > 0 and rung not in JETS:
        raise ValueError(f"Rung {rung!r} holds at one point of weight space: use 'activations' or 'prior' for a ball.")
    if radius > 0 and c.activation == "relu":
        raise ValueError("The Hessian of a ReLU network says nothing about a ball: use gelu or radius 0.")
    if floor is not None and rung not in ("closed_form", "prior"):
        raise ValueError(f"Rung {rung!r} measures rho itself: leave variance_floor out.")
    if floor is not None and not 0 < floor < math.inf:
        raise ValueError(f"variance_floor is {floor}: give a finite number > 0.")


def _check_measured(measured: Measured | None, model: nn.Module, rung: str, radius: float) -> None:
    if measured is None:
        return
    if rung not in ("closed_form", "prior") or type(model) is not ViT:
        raise ValueError(f"Rung {rung!r} takes no measured norms: use 'closed_form' or 'prior' of a ViT.")
    if radius > measured.radius:
        raise ValueError(f"The norms were measured for radius {measured.radius}, not {radius}: measure them anew.")


def _kept(model: nn.Module, groups: list[str], patterns: list[str] | None) -> list[int]:
    """Indices of the groups with a parameter that matches."""
    names = [name for name, _ in model.named_parameters()]
    if patterns is not None:
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    kept = [g for g, group in enumerate(groups) if any(n == group or n.startswith(group + ".") for n in names)]
    if not kept:
        raise ValueError(f"No parameter matches {patterns}: take patterns from the model's named_parameters.")
    return kept


def _float64(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).cpu()


def _never_nan(value: Tensor) -> Tensor:
    return torch.where(value.isnan(), torch.inf, value)


def _norm_of_nonnegative(M: Tensor) -> Tensor:
    """||M|| of symmetric nonnegative matrices (n, m, m), rounded up; inf where an entry is."""
    scale = M.amax((-2, -1))
    safe = torch.where(((scale > 0) & scale.isfinite())[:, None, None], M / scale[:, None, None], torch.zeros_like(M))
    top = _largest_eigenvalue(safe) * scale * ROUNDING
    return torch.where(scale.isfinite(), _never_nan(top), torch.inf)
