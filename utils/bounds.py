"""Rigorous upper bounds on the spectral norm of every per-sample Hessian of a `ViT`.

The ladder, from the loosest and most general rung to the sharpest:

    closed_form   one formula in sizes and norms of the weights      (Theorem 2, thm:closed-form)
    prior         norms of the weights, one row for each group       (Theorem 1, thm:jet; ball: cor:ball)
    activations   the sample's own activations                       (Theorem 1, thm:jet)
    adjoint, blocks, tangents, majorant, deflated                    the second-order forms at one point: `utils.forms`

Symbols follow the paper: N tokens, d width, H heads, d_h = d/H, K classes, `rho` the LayerNorm scale,
`Gamma` = max |gamma_j|, omega = ||[W b]||, `chi` a bound of ||[X 1]|| for LayerNorm rows X, R a radius.
||.|| is the spectral norm, |.| the Euclidean (Frobenius) norm. Weight and bias of one linear map are one
group [W b], so are gamma and beta of one LayerNorm. Everything is float64; each bound is a sum of products
of nonnegative numbers, so that rounding costs a relative 1e-11 at most and `ROUNDING` covers it. An
overflow gives inf, which is still a bound. The rounding of the measured activations is not covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from utils import calculus, curvature, forms
from utils.forms import ROUNDING
from utils.forms import spectral as _spectral
from utils.models import ACTIVATIONS, LOSSES, ViT, prepared_copy

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
    high = torch.minimum(torch.minimum(first, gershgorin.clamp(max=SOFTMAX_FIRST)), 2 * others)
    high = torch.maximum(high, low)
    for _ in range(60):
        middle = (low + high) / 2
        above = first / (first - middle) >= (rest / (middle[..., None] - rest)).nan_to_num(nan=0.0).sum(-1)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high * (1 + 1e-12)


def softmax_second(first: Tensor) -> Tensor:
    """A bound of ||D^2 s|| from ||Ds||: min(sqrt(6)/9, sqrt(2) ||Ds||). Source: Lemma 1 (lem:softmax), part (ii)."""
    return (math.sqrt(2) * first).clamp(max=SOFTMAX_SECOND)


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
    shape = torch.where(tau <= 1 / 3, 1 - tau, 2 / (3 * (3 * tau).clamp(min=1).sqrt()))
    second = gamma.abs().max() * (3 * tau.sqrt() * shape / (math.sqrt(d) * rho2)).amax(-1)
    n = y / rho2.sqrt()[..., None]
    n2, n1, N = n.square().sum(1), n.sum(1), n.shape[1]  # per column: |n_j|^2, sum of n_j
    own = ((n2 + N) / 2 + (((n2 - N) / 2).square() + n1.square()).sqrt()).amax(-1).sqrt()
    rows = (1 - 1 / d - ((2 - tau) / (d * rho2))[..., None] * y.square()).amax(-1)
    return {"first": first, "second": second, "own": own, "mixed": (rows.clamp(min=0) / rho2).sqrt().amax(-1)}


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
        return Jet(_over(first, 1) * self.a, _over(first, 2) * self.B + _over(second, 2) * _outer(self.a, self.a))

    def times(self, other: Jet, norm_self, norm_other, form=1.0) -> Jet:
        """The jet of a bilinear z(X, Y), X = self, Y = other.

        |z(X, dY)| <= norm_self |dY|, |z(dX, Y)| <= norm_other |dX|, |z(dX, dY)| <= form |dX| |dY|.
        Source: Lemma 5 (lem:bilinear), Theorem 1 (thm:jet).
        """
        a = _over(norm_self, 1) * other.a + _over(norm_other, 1) * self.a
        B = _over(norm_self, 2) * other.B + _over(norm_other, 2) * self.B
        cross = _outer(self.a, other.a)
        return Jet(a, B + _over(form, 2) * (cross + cross.mT))


def _over(c, dims: int):
    return c.reshape(c.shape + (1,) * dims) if isinstance(c, Tensor) and c.ndim else c


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u[..., :, None] * v[..., None, :]


def _largest_eigenvalue(M: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(M)[..., -1]


def _hypot(u, v):
    """sqrt(u^2 + v^2) of floats or tensors, without overflow in between."""
    if not isinstance(u, Tensor) and not isinstance(v, Tensor):
        return math.hypot(u, v)
    like = u if isinstance(u, Tensor) else v
    return torch.hypot(*(torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in (u, v)))


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
    """What is known of a matrix X of N rows for all inputs: >= max_t |x_t|, >= |X|, >= |X - mean over rows|."""

    N: int
    row: float | Tensor
    full: float | Tensor
    centred: float | Tensor

    @property
    def X1(self):  # >= |[X 1]|
        return _hypot(self.full, math.sqrt(self.N))

    def some(self, N: int) -> _Rows:
        return self if N == self.N else _Rows(N, self.row, math.sqrt(N) * self.row, math.sqrt(N) * self.row)


def _layer_norm_rows(norm: nn.Module, N: int, R: float) -> _Rows:
    """|gamma n + beta| <= Gamma sqrt(d) + |beta|; beta is the same in every row. Source: Lemma 3 (lem:layernorm)."""
    spread = (float(norm.weight.abs().max()) + R) * math.sqrt(norm.weight.numel())
    row = spread + float(norm.bias.norm()) + R
    return _Rows(N, row, math.sqrt(N) * row, math.sqrt(N) * spread)


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
    Source: Lemma 5 (lem:bilinear).
    """
    H = att.n_heads
    values = float(_per_head(att.value, H, True).norm()) + R
    return _attention_weights(att, R) | {
        "X1": X.X1,
        "X1_query": queries.X1,
        "X_centred": X.centred,
        "Q": (float(_per_head(att.query, H, True).max()) + R) * queries.X1,
        "K": (float(_per_head(att.key, H, False).max()) + R) * X.centred,
        "V": (float(_per_head(att.value, H, False).max()) + R) * X.centred,
        "A": math.sqrt(queries.N),
        "softmax1": SOFTMAX_FIRST,
        "softmax2": SOFTMAX_SECOND,
        "O1": math.sqrt(queries.N) * _hypot(values * _hypot(X.row, 1.0), 1.0),
    }


def _attention_data(att: nn.Module, X: Tensor, queries: Tensor) -> tuple[dict, Tensor]:
    """Norms of the attention nodes at inputs X (n, N, d) and query rows (n, N_q, d), and the output (n, N_q, d)."""
    H, d_h = att.n_heads, X.shape[-1] // att.n_heads

    def heads(z):  # (n, N, d) -> (n, H, N, d_h)
        return z.unflatten(-1, (H, d_h)).transpose(1, 2)

    Q, K, V = heads(att.query(queries)), heads(att.key(X)), heads(att.value(X))
    A = (Q @ K.mT / math.sqrt(d_h)).softmax(-1)  # (n, H, N_q, N)
    mixed = (A @ V).transpose(1, 2).flatten(2)  # O
    first = softmax_first(A).amax((1, 2))
    norms = _attention_weights(att, 0.0) | {
        "X1": _spectral(_with_ones(X)),
        "X1_query": _spectral(_with_ones(queries)),
        "X_centred": _spectral(_centred(X)),
        "Q": _spectral(Q).amax(1),
        "K": _spectral(_centred(K)).amax(1),
        "V": _spectral(_centred(V)).amax(1),
        "A": _spectral(A).amax(1),
        "softmax1": first,
        "softmax2": softmax_second(first),
        "O1": _spectral(_with_ones(mixed)),
    }
    return norms, att.out(mixed)


def _mlp_prior(mlp: nn.Module, X: _Rows, R: float) -> dict:
    first, second = ACTIVATION_BOUNDS[mlp.activation]
    G1 = _hypot(_omega(mlp.fc1, R) * X.X1, math.sqrt(X.N))  # |act(z)| <= |z|
    return _weight_norms({"W_1": mlp.fc1, "W_2": mlp.fc2}, R) | {"X1": X.X1, "act1": first, "act2": second, "G1": G1}


def _mlp_data(mlp: nn.Module, X: Tensor) -> tuple[dict, Tensor]:
    Z = mlp.fc1(X)
    first, second = (t.abs().amax((1, 2)) for t in calculus.activation_derivatives(mlp.activation, Z))
    if mlp.activation == "relu":  # at a kink the larger slope
        first = (Z >= 0).any(2).any(1).to(first)
    G = ACTIVATIONS[mlp.activation](Z)
    norms = {"X1": _spectral(_with_ones(X)), "act1": first, "act2": second, "G1": _spectral(_with_ones(G))}
    return norms | _weight_norms({"W_1": mlp.fc1, "W_2": mlp.fc2}, 0.0), mlp.fc2(G)


def _named(prefix: str, norms: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in norms.items()}


def _prior_norms(model: ViT, x: Tensor, loss: str, R: float, floor: float | None) -> dict:
    """Every norm of the chain from the norms of the weights (enlarged by R) and of the patches alone."""
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
    h = _Rows(N, rows + float(model.pos.norm(dim=-1).max()) + R, full, full)
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
    if loss == "cross_entropy":
        return out | {"r_hat": CROSS_ENTROPY_FIRST, "S_hat": CROSS_ENTROPY_SECOND}
    scale = 2 / c.n_classes
    return out | {"r_hat": scale * (_omega(model.head, R) * out["head.X1"] + 1), "S_hat": scale}


def _data_norms(model: ViT, x: Tensor, y: Tensor, loss: str) -> dict:
    """Every norm of the chain at the samples' own activations: one forward pass."""
    c = model.config
    patches = model.patches(x)
    out = {"embed.X1": _spectral(_with_ones(patches))}
    h = model.embed(patches)
    if c.pool == "cls":
        h = torch.cat([model.cls.expand(len(h), 1, -1), h], 1)
    h = h + model.pos  # (n, N, d)
    for i, block in enumerate(model.blocks):
        some = slice(0, 1) if c.pool == "cls" and i == c.depth - 1 else slice(None)
        p = f"blocks.{i}"
        X = block.norm1(h) if c.norm == "pre" else h
        norms, attended = _attention_data(block.attention, X, X[:, some])
        out |= _named(f"{p}.attention", norms)
        if c.norm == "pre":
            out |= _named(f"{p}.norm1", layer_norm_norms(block.norm1, h))
            out |= _named(f"{p}.norm1_query", layer_norm_norms(block.norm1, h[:, some]))
        h = h[:, some] + attended
        between, name = (block.norm2, "norm2") if c.norm == "pre" else (block.norm1, "norm1")
        out |= _named(f"{p}.{name}", layer_norm_norms(between, h))
        X = between(h)
        norms, moved = _mlp_data(block.mlp, X)
        out |= _named(f"{p}.mlp", norms)
        h = (h if c.norm == "pre" else X) + moved
        if c.norm == "post":
            out |= _named(f"{p}.norm2", layer_norm_norms(block.norm2, h))
            h = block.norm2(h)
    v = h[:, :1] if c.pool == "cls" else h.mean(1, keepdim=True)
    if c.norm == "pre":
        out |= _named("norm", layer_norm_norms(model.norm, v))
        v = model.norm(v)
    out |= {"head.X1": _with_ones(v[:, 0]).norm(dim=-1), "head.W": float(_spectral(model.head.weight))}
    f = model.head(v[:, 0])
    if loss == "cross_entropy":
        r, S = cross_entropy_norms(f, y)
    else:
        target = torch.nn.functional.one_hot(y, c.n_classes).to(f.dtype)
        r, S = 2 / c.n_classes * (f - target).norm(dim=-1), 2 / c.n_classes
    return out | {"r_hat": r, "S_hat": S}


# --- Theorem 1 along the network ----------------------------------------------------------------------


def _group_names(model: ViT) -> list[str]:
    c = model.config
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
        mixed = A.times(V, k["A"], k["V"])  # |dA V| <= ||V centred|| |dA|, |A dV| <= ||A|| |dV|
        out = linear(mixed, f"{p}.out", k["O1"], k["W_O"])
        nodes.update(_named(p, {"Q": Q, "K": K, "V": V, "T": T, "A": A, "O": mixed, "out": out}))
        return out

    def mlp(X, p):
        k = {key[len(p) + 1 :]: value for key, value in norms.items() if key.startswith(p + ".")}
        Z = linear(X, f"{p}.fc1", k["X1"], k["W_1"])
        G = Z.smooth(k["act1"], k["act2"])
        out = linear(G, f"{p}.fc2", k["G1"], k["W_2"])
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


def _growth(model: ViT, norms: dict, n: int) -> Tensor:
    """>= ||dh_{l+1}/dh_l|| for each block, (n, L): what multiplies the jets from block to block."""
    c, out = model.config, []
    for i in range(c.depth):
        k = {key.removeprefix(f"blocks.{i}."): value for key, value in norms.items() if key.startswith(f"blocks.{i}.")}
        a = {key.removeprefix("attention."): value for key, value in k.items() if key.startswith("attention.")}
        scores = (a["Q"] * a["W_K"] + a["K"] * a["W_Q"]) / math.sqrt(c.d_model // c.n_heads)
        att = a["W_O"] * (a["A"] * a["W_V"] + a["V"] * a["softmax1"] * scores)
        mlp = k["mlp.W_2"] * k["mlp.act1"] * k["mlp.W_1"]
        if c.norm == "pre":
            G = (1 + att * k["norm1.first"]) * (1 + mlp * k["norm2.first"])
        else:
            G = k["norm1.first"] * (1 + att) * k["norm2.first"] * (1 + mlp)
        out.append(torch.as_tensor(G, dtype=torch.float64).cpu().expand(n))
    return torch.stack(out, 1) if out else torch.zeros(n, 0, dtype=torch.float64)


# --- Theorem 2: the closed form -----------------------------------------------------------------------


@torch.no_grad()
def closed_form(model: ViT, x: Tensor, radius: float = 0.0, variance_floor: float | None = None) -> dict[str, Tensor]:
    """Every quantity of the closed form for a pre-norm ViT with cross-entropy; "M" (n,) bounds ||H_i||.

    model (pre-norm) and x (n, C, S, S) in float64, not checked here; all weights within `radius` of the model's.
    `hessian_norm_bounds` checks and converts. D bounds the first and E the second
    derivative of the running node jointly over all weights; P = growth by the residual path, C = what a
    sublayer adds to E. M = D^2/2 + sqrt(2) E at the logits. Values are float64 (n,) or floats;
    "growth" (L,) is P_att P_mlp of each block. `variance_floor`: see `hessian_norm_bounds`.
    Source: Theorem 2 (thm:closed-form), Corollary (cor:ball).
    """
    c, R = model.config, radius
    d, N, H, s = c.d_model, len(model.pos), c.n_heads, 1 / math.sqrt(c.d_model // c.n_heads)
    norms = [m for b in model.blocks for m in (b.norm1, b.norm2)] + [model.norm]
    Gamma = max(float(m.weight.abs().max()) for m in norms) + R
    beta = max(float(m.bias.norm()) for m in norms) + R
    rho, curvature = _rho_floor(c.eps, variance_floor)
    row1 = math.hypot(Gamma * math.sqrt(d) + beta, 1.0)  # >= |[X_t 1]|, chi_1
    chi = math.sqrt(N) * row1
    l1, l2 = Gamma / rho, Gamma * curvature / math.sqrt(d)
    x1, x2 = math.hypot(l1, math.sqrt(N * d)), l2 + 1 / rho
    xhat = max(x1, 1.0)
    act1, act2 = ACTIVATION_BOUNDS[c.activation]

    D = (_with_ones(model.patches(x)).flatten(1).square().sum(-1) + 1).sqrt()
    E = torch.zeros_like(D)
    out = {"chi": chi, "rho": rho, "Gamma": Gamma, "l1": l1, "l2": l2, "x1": x1, "x2": x2, "D0": D}
    growth = []

    def sublayer(D, E, P, own, C):
        return _hypot(P * D, own), P * E + C * D.square().clamp(min=1)

    for i, block in enumerate(model.blocks):
        att, mlp = block.attention, block.mlp
        wQ, wK, wV, wO = (_omega(m, R) for m in (att.query, att.key, att.value, att.out))
        w1, w2 = _omega(mlp.fc1, R), _omega(mlp.fc2, R)
        q, k, v = (math.hypot(w, chi) for w in (wQ, wK, wV))
        t1, t2 = s * chi * (wK * q + wQ * k), s * (chi * (wK + wQ) + 2 * q * k)
        a1, a2 = SOFTMAX_FIRST * t1, SOFTMAX_FIRST * t2 + SOFTMAX_SECOND * t1 * t1
        o1 = math.sqrt(N) * v + wV * chi * a1
        o2 = math.sqrt(N) + wV * chi * a2 + 2 * a1 * v
        y1, y2 = math.hypot(wO * o1, math.sqrt(H) * wV * chi, math.sqrt(N)), wO * o2 + o1
        lam_att = wO * wV * (math.sqrt(N) + s * wQ * wK * chi * chi)
        P_att, C_att = 1 + lam_att * l1, y1 * x2 + y2 * xhat * xhat
        D, E = sublayer(D, E, P_att, y1 * math.sqrt(N * d), C_att)

        z1 = math.hypot(w1, chi)
        g1, g2 = act1 * z1, act1 + act2 * z1 * z1
        m1, m2 = math.hypot(w2 * g1, w1 * chi, math.sqrt(N)), w2 * g2 + g1
        lam_mlp = act1 * w1 * w2
        P_mlp, C_mlp = 1 + lam_mlp * l1, m1 * x2 + m2 * xhat * xhat
        D, E = sublayer(D, E, P_mlp, m1 * math.sqrt(N * d), C_mlp)
        growth.append(P_att * P_mlp)
        names = ("t1", "t2", "o1", "o2", "y1", "y2", "z1", "g1", "g2", "m1", "m2", "P_att", "C_att", "P_mlp", "C_mlp")
        values = (t1, t2, o1, o2, y1, y2, z1, g1, g2, m1, m2, P_att, C_att, P_mlp, C_mlp)
        out |= _named(f"blocks.{i}", dict(zip(names, values, strict=True)) | {"D": D, "E": E})
    if c.pool == "mean":
        D, E = D / math.sqrt(N), E / math.sqrt(N)
    D, E = _hypot(l1 * D, math.sqrt(d)), l1 * E + x2 * D.square().clamp(min=1)
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
    **options,
) -> Bound:
    """Bound ||H_i||, the spectral norm of the Hessian in the weights of sample i's loss, for each sample.

    model: a `utils.models.ViT`, left unchanged. x: images (n, C, S, S), y: classes (n,). loss:
    "cross_entropy" or "mse" (mean over the classes). rung: "closed_form" (pre-norm with cross-entropy, all
    weights), "prior" (norms of weights and patches), "activations" (one forward pass; the sample's own LayerNorm
    scales, attention rows, activation slopes and residual), "adjoint", "blocks", "tangents" (`forms.small_matrix`),
    "majorant" or "deflated" (`forms.majorant`, `forms.deflated`, whose `options` they take). The majorant holds with
    probability `confidence`, 0.95 if none is given; all others always.
    radius: with radius > 0 the values hold for all weights within that Euclidean distance of the model's, all
    groups moving together (closed_form and prior). parameters: name patterns (fnmatch) that select the weights; a
    group counts as a whole if one of its parameters matches, which can only enlarge the bound.
    variance_floor: an ASSUMED lower bound of every LayerNorm's rho = sqrt(variance + eps) at every token of every
    sample and for all weights of the ball (closed_form and prior). Nothing here checks it, and where it fails
    the values need not be bounds; without it rho >= sqrt(eps), which always holds.
    ReLU: the Hessian exists almost everywhere only, and the values bound it there.

    Raises ValueError for another module, a rung that does not apply, a ReLU ball, or patterns without a match.
    Source: Theorem 1 (thm:jet), Theorem 2 (thm:closed-form), Corollary (cor:ball), Lemmas 1-5 (lem:softmax,
    lem:cross-entropy, lem:layernorm, lem:activations, lem:bilinear).
    """
    _check(model, x, y, loss, rung, radius, parameters, variance_floor)
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
        return Bound(rung, values, groups, None, terms | {"log10": values.log10()})
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
            terms = {name: _float64(value) for name, value in closed_form(twin, x, radius, variance_floor).items()}
            values = _never_nan(terms.pop("M") * ROUNDING)
            terms["growth"] = terms["growth"].expand(len(values), -1)
            return Bound(rung, values, groups, None, terms | {"log10": values.log10()})
        keep = _kept(twin, groups, parameters)
        # keep the tensors (samples, N, d, d) and (samples, H, N, N) near 100 MB
        c, N = twin.config, len(twin.pos)
        chunk = max(1, int(1.2e7 / (N * c.d_model**2 + c.n_heads * N**2 + 3 * len(groups) ** 2)))
        parts = [
            _small_matrix(twin, x[i : i + chunk], y[i : i + chunk], loss, rung, radius, variance_floor, keep)
            for i in range(0, len(x), chunk)
        ]
    blocks = torch.cat([part[0] for part in parts])
    terms = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    values = _norm_of_nonnegative(blocks)
    return Bound(rung, values, [groups[g] for g in keep], blocks, terms | {"log10": values.log10()})


def _small_matrix(model, x, y, loss, rung, radius, floor, keep) -> tuple[Tensor, dict[str, Tensor]]:
    """||H_l|| <= || r_hat B_f + S_hat a_f a_f^T ||, entry by entry. Source: Theorem 1 (thm:jet)."""
    norms = _prior_norms(model, x, loss, radius, floor) if rung == "prior" else _data_norms(model, x, y, loss)
    f = _jets(model, norms, x)["f"]
    r, S = (_float64(norms[name]).expand(len(x)) for name in ("r_hat", "S_hat"))
    a, B = f.a[:, keep].cpu(), f.B[:, keep][:, :, keep].cpu()
    blocks = _never_nan((_over(r, 2) * B + _over(S, 2) * _outer(a, a)) * ROUNDING)
    terms = {name: _float64(value).expand(len(x)) for name, value in norms.items()}
    D, E = _never_nan(a).norm(dim=-1), _norm_of_nonnegative(_never_nan(B))
    return blocks, terms | {"D": D, "E": E, "growth": _growth(model, norms, len(x))}


def loss_upper_bound(model: nn.Module, radius: float = 0.0) -> float:
    """C with 0 <= cross-entropy <= C for every input and all weights within `radius` of the model's.

    C = ln K + sqrt(2) omega_h chi_1, chi_1^2 = (Gamma sqrt(d) + |beta|)^2 + 1 for the LayerNorm that the head
    reads, because |f| <= omega_h chi_1 and l <= ln K + max_c f_c - f_y. Holds for ReLU too. Raises ValueError
    for another module than a `utils.models.ViT`. Source: (eq:loss-bound).
    """
    _check_model(model)
    _check_radius(radius)
    twin = prepared_copy(model)
    if twin.config.norm == "post" and twin.config.depth == 0:
        raise ValueError("A post-norm ViT without blocks has no LayerNorm before its head: give it depth 1 or more.")
    with torch.no_grad():
        rows = _layer_norm_rows(twin.norm if twin.config.norm == "pre" else twin.blocks[-1].norm2, 1, radius)
        chi_1 = math.sqrt(rows.row**2 + 1)
        return (math.log(twin.config.n_classes) + CROSS_ENTROPY_FIRST * _omega(twin.head, radius) * chi_1) * ROUNDING


def _check_model(model: nn.Module) -> None:
    if type(model) is not ViT or not calculus.known(model):
        raise ValueError(
            f"The analytic bounds know only the networks of utils.models.ViT, not {type(model).__name__}: "
            "use the certified measured norm, which applies to any module."
        )


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius is {radius}: give a finite number >= 0.")


def _check(model, x, y, loss, rung, radius, parameters, floor) -> None:
    _check_model(model)
    _check_radius(radius)
    c = model.config
    if rung not in RUNGS:
        raise ValueError(f"rung is {rung!r}: choose one of {', '.join(RUNGS)}.")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")
    shape = (c.channels, c.image_size, c.image_size)
    if tuple(x.shape[1:]) != shape or x.shape[0] == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: give images (n, {', '.join(map(str, shape))}) "
            "and one class each."
        )
    if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < c.n_classes:
        raise ValueError(f"y has to hold integer classes from 0 to {c.n_classes - 1}: map the labels to them.")
    if not all(bool(t.isfinite().all()) for t in (x, *model.parameters())):
        raise ValueError("The images or the weights hold NaN or infinity: remove them and run again.")
    if rung == "closed_form" and (c.norm != "pre" or loss != "cross_entropy"):
        raise ValueError(
            f"The closed form holds for pre-norm and cross-entropy, not {c.norm}-norm with {loss}: use rung 'prior'."
        )
    if rung == "closed_form" and parameters is not None:
        raise ValueError("The closed form covers all weights together: use rung 'prior' with parameters.")
    if radius > 0 and rung not in ("closed_form", "prior"):
        raise ValueError(f"Rung {rung!r} holds at one point of weight space: use 'prior' for a ball.")
    if radius > 0 and c.activation == "relu":
        raise ValueError("The Hessian of a ReLU network says nothing about a ball: use gelu or radius 0.")
    if floor is not None and rung not in ("closed_form", "prior"):
        raise ValueError(f"Rung {rung!r} measures rho itself: leave variance_floor out.")
    if floor is not None and not 0 < floor < math.inf:
        raise ValueError(f"variance_floor is {floor}: give a finite number > 0.")


def _kept(model: ViT, groups: list[str], patterns: list[str] | None) -> list[int]:
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
