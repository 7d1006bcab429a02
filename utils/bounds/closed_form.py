"""The closed form of a pre-norm ViT: one formula in sizes and norms of the weights.

Symbols follow the paper: N tokens, d width, H heads, d_h = d/H, `rho` the LayerNorm scale, `Gamma`
= max |gamma_j|, omega = ||[W b]||, `chi` a bound of ||[X 1]|| for LayerNorm rows X, R a radius.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.bounds.subject import ROUNDING
from utils.bounds.walk import Measured
from utils.calculus.lemmas import (
    CROSS_ENTROPY_FIRST,
    CROSS_ENTROPY_SECOND,
    SOFTMAX_FIRST,
    SOFTMAX_SECOND,
    hypot,
    mixing,
    normalisation_floor,
    spectral,
    through,
    with_ones,
)
from utils.calculus.nodes.elementwise import SLOPES
from utils.networks import ViT
from utils.networks.copies import prepared_copy


def check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str,
    radius: float,
    parameters: list[str] | None,
) -> None:
    """ValueError unless the closed form holds for this network, loss and choice of weights.

    model, x, y  the network, inputs (n, C, S, S) and classes (n,)
    loss         its name
    radius       of the ball of weights
    parameters   patterns of the weights that move, None for all
    """
    if type(model) is not ViT or model.config.norm != "pre" or loss != "cross_entropy":
        kind = f"{model.config.norm}-norm" if type(model) is ViT else type(model).__name__
        raise ValueError(
            f"The closed form holds for a pre-norm ViT and cross_entropy, not {kind} with {loss}: "
            "use rung 'prior'."
        )
    if parameters is not None:
        raise ValueError(
            "The closed form covers all weights together: use rung 'prior' with parameters."
        )
    if radius > 0 and model.config.activation == "relu":
        raise ValueError(
            "The Hessian of a ReLU network says nothing about a ball: use gelu or radius 0."
        )
    c = model.config
    shape = (c.channels, c.image_size, c.image_size)
    if tuple(x.shape[1:]) != shape or y.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: give inputs "
            f"(n, {', '.join(map(str, shape))}) and one class each."
        )


@dataclass(frozen=True)
class Normed:
    """Norms of a LayerNorm: ||D||, of (gamma, beta) -> output, of D^2 with all that moves, and of
    its output: Gamma sqrt(d), |[X_t 1]|, ||[X 1]||."""

    first: float
    second: float
    own: float
    mixed: float
    spread: float
    row: float
    chi: float

    @property
    def joint(self) -> float:
        """>= ||D|| in the input and its own weights together, and 1."""
        return max(math.hypot(self.first, self.own), 1.0)


class Formula:
    """The recursion of Theorem 2 over the blocks.

    D bounds the first and E the second derivative of the running node jointly over all weights.
    """

    def __init__(self, model: ViT, radius: float, floor: float | None, measured: Measured | None):
        self.model = model
        self.config = model.config
        self.N = len(model.pos)
        self.R = radius
        self.measured = measured
        self.rho, self.bend = normalisation_floor(self.config.eps, floor)
        if self.rho == 0:
            raise ValueError(
                "A LayerNorm has eps = 0, so no bound holds for every input: give variance_floor."
            )
        blocks = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
        self.norms = [*blocks, model.norm]

    def least(self, module: str, name: str, value: float) -> float:
        """`value`, or the number `name` measured of a module where that is smaller."""
        return value if self.measured is None else self.measured.least(module, name, value)

    def omega(self, linear: nn.Linear) -> float:
        """||[W b]|| of a linear layer on the ball."""
        both = torch.cat([linear.weight, linear.bias[:, None]], 1)
        return float(spectral(both)) + self.R

    def normed(self, module: str, own: nn.LayerNorm, rows: int) -> Normed:
        """Of the largest of all LayerNorms, or with measured numbers of this one.

        module  its name
        own     the LayerNorm itself
        rows    how many tokens read it
        """
        those = self.norms if self.measured is None else [own]
        root = math.sqrt(self.config.d_model)
        Gamma = max(float(m.weight.abs().max()) for m in those) + self.R
        length = Gamma * root + max(float(m.bias.norm()) for m in those) + self.R
        row = math.hypot(length, 1.0)
        second = self.least(module, "second", Gamma * self.bend / root)
        return Normed(
            first=self.least(module, "first", Gamma / self.rho),
            second=second,
            own=self.least(module, "own", math.sqrt(rows) * root),
            mixed=second + self.least(module, "mixed", 1 / self.rho),
            spread=Gamma * root,
            row=row,
            chi=math.sqrt(self.N) * row,
        )

    def attention(self, i: int, norm: Normed) -> dict[str, float]:
        """First and second derivative of scores t, heads o and output y of block i in the input
        and all weights of the sublayer, and the growth P along the residual path; `norm` is that
        of the LayerNorm before it."""
        block = self.model.blocks[i].attention
        H = self.config.n_heads
        scale = 1 / math.sqrt(self.config.d_model // H)
        chi = norm.chi
        wQ, wK, wV, wO = map(self.omega, (block.query, block.key, block.value, block.out))
        first = q, k, v = tuple(math.hypot(w, chi) for w in (wQ, wK, wV))
        sizes = dict.fromkeys(("q", "reach", "sigma_K", "sigma_V", "covariance"), math.inf)
        sizes |= {"Q": wQ * chi, "K": wK * chi, "V": wV * chi}
        sizes |= {"softmax1": SOFTMAX_FIRST, "softmax2": SOFTMAX_SECOND}
        sizes |= {"A": math.sqrt(self.N), "columns": float(self.N)}
        if self.measured is not None:
            a = wK * norm.spread
            b = wV * norm.spread
            sizes |= {"q": wQ * norm.row, "sigma_K": a, "sigma_V": b}
            sizes |= {"covariance": a * b, "reach": 2 * b}
        place = f"blocks.{i}.attention"
        sizes = {name: self.least(place, name, value) for name, value in sizes.items()}
        by, pairs = mixing(sizes, scale)
        of_Q, of_K, of_V = map(float, by)
        o1 = of_Q * q + of_K * k + of_V * v
        cross = [(1 + (i != j)) * float(c) * first[i] * first[j] for (i, j), c in pairs.items()]
        o2 = of_Q + of_K + of_V + sum(cross)
        y1 = math.hypot(wO * o1, math.sqrt(H) * wV * chi, math.sqrt(self.N))
        y2 = wO * o2 + o1
        path = wO * (of_Q * wQ + of_K * wK + of_V * wV)
        return {
            "t1": scale * chi * (wK * q + wQ * k),
            "t2": scale * (chi * (wK + wQ) + 2 * q * k),
            "o1": o1,
            "o2": o2,
            "y1": y1,
            "y2": y2,
            "P_att": 1 + path * norm.first,
            "C_att": y1 * norm.mixed + y2 * norm.joint**2,
        }

    def perceptron(self, i: int, norm: Normed) -> dict[str, float]:
        """The same of z, g and output m of the MLP of block i behind the LayerNorm `norm`."""
        block = self.model.blocks[i].mlp
        slopes = SLOPES[self.config.activation]
        place = f"blocks.{i}.mlp"
        w1 = self.omega(block.fc1)
        w2 = self.omega(block.fc2)
        act1 = self.least(place, "act1", slopes.first)
        act2 = self.least(place, "act2", slopes.second)
        z1 = math.hypot(w1, norm.chi)
        g1 = act1 * z1
        g2 = act1 + act2 * z1 * z1
        m1 = math.hypot(w2 * g1, w1 * norm.chi, math.sqrt(self.N))
        m2 = w2 * g2 + g1
        product = math.inf
        if self.measured is not None:
            norms = [float(spectral(m.weight)) + self.R for m in (block.fc1, block.fc2)]
            product = float(spectral(block.fc2.weight @ block.fc1.weight)) + self.R * sum(norms)
        path = float(through(product, w1 * w2, act1, slopes.low, slopes.high))
        return {
            "z1": z1,
            "g1": g1,
            "g2": g2,
            "m1": m1,
            "m2": m2,
            "P_mlp": 1 + path * norm.first,
            "C_mlp": m1 * norm.mixed + m2 * norm.joint**2,
        }


@torch.no_grad()
def closed_form(
    model: ViT,
    x: Tensor,
    radius: float = 0.0,
    variance_floor: float | None = None,
    measured: Measured | None = None,
) -> dict[str, Tensor | float]:
    """Every quantity of the closed form for a pre-norm ViT with cross-entropy; "M" (n,) bounds
    ||H_i||.

    model (pre-norm) and x (n, C, S, S) in float64, not checked here; all weights within `radius` of
    the model's. D bounds the first and E the second derivative of the running node jointly over all
    weights; P = growth by the residual path, C = what a sublayer adds to E. M = D^2/2 + sqrt(2) E
    at the logits. Values are float64 (n,) or floats; "growth" (L,) is P_att P_mlp of each block.

    variance_floor, measured  see `hessian_bounds`; with `measured` Gamma and beta are those of each
                              LayerNorm, not the largest, and the coefficients of mixing and of the
                              MLP the smaller ones of `mixing` and `through`

    Raises ValueError where eps is 0 and no floor is given. Source: Theorem 2 (thm:closed-form),
    Corollary (cor:ball), Proposition (prop:measured).
    """
    of = Formula(model, radius, variance_floor, measured)
    norm = of.normed("", of.norms[0], of.N)
    D = (with_ones(model.patches(x)).flatten(1).square().sum(-1) + 1).sqrt()
    E = torch.zeros_like(D)
    Gamma = norm.spread / math.sqrt(model.config.d_model)
    terms: dict[str, Tensor | float] = {"chi": norm.chi, "rho": of.rho, "Gamma": Gamma, "D0": D}
    terms |= {"l1": norm.first, "l2": norm.second}
    terms |= {"x1": math.hypot(norm.first, norm.own), "x2": norm.mixed}
    growth = []
    for i, block in enumerate(model.blocks):
        norm = of.normed(f"blocks.{i}.norm1", block.norm1, of.N)
        found = of.attention(i, norm)
        E = found["P_att"] * E + found["C_att"] * D.square().clamp(min=1)
        D = hypot(found["P_att"] * D, found["y1"] * norm.own)
        norm = of.normed(f"blocks.{i}.norm2", block.norm2, of.N)
        found |= of.perceptron(i, norm)
        E = found["P_mlp"] * E + found["C_mlp"] * D.square().clamp(min=1)
        D = hypot(found["P_mlp"] * D, found["m1"] * norm.own)
        growth.append(found["P_att"] * found["P_mlp"])
        found |= {"D": D, "E": E}
        terms |= {f"blocks.{i}.{name}": value for name, value in found.items()}
    if model.config.pool == "mean":
        D = D / math.sqrt(of.N)
        E = E / math.sqrt(of.N)
    norm = of.normed("norm", model.norm, 1)
    E = norm.first * E + norm.mixed * D.square().clamp(min=1)
    D = hypot(norm.first * D, norm.own)
    head = of.omega(model.head)
    E = head * E + D.clamp(min=1)
    D = hypot(head * D, norm.row)
    gauss_newton = CROSS_ENTROPY_SECOND * D**2
    functional = CROSS_ENTROPY_FIRST * E
    return terms | {
        "growth": torch.tensor(growth, dtype=torch.float64),
        "D": D,
        "E": E,
        "gauss_newton": gauss_newton,
        "functional": functional,
        "M": gauss_newton + functional,
    }


@torch.no_grad()
def loss_upper_bound(model: nn.Module, radius: float = 0.0) -> float:
    """C with 0 <= cross-entropy <= C for every input and all weights within `radius` of the
    model's [nat].

    C = ln K + sqrt(2) omega_h chi_1, chi_1^2 = (Gamma sqrt(d) + |beta|)^2 + 1 for the LayerNorm
    that the head reads, because |f| <= omega_h chi_1 and l <= ln K + max_c f_c - f_y. Holds for
    ReLU too.

    model   a `ViT`
    radius  Euclidean, in the weights

    Raises ValueError for another module. Source: (eq:loss-bound).

    >>> from utils.networks import build_model
    >>> sizes = {"image_size": 2, "channels": 1, "patch_size": 1, "n_classes": 2, "depth": 1}
    >>> model = build_model("vit", **sizes, n_heads=1, d_model=2, d_ff=2)
    >>> loss_upper_bound(model) < loss_upper_bound(model, radius=1.0)
    True
    """
    if type(model) is not ViT:
        raise ValueError(
            f"The bound of the loss knows only utils.networks.ViT, not {type(model).__name__}: "
            "give the ceiling of the loss yourself."
        )
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius is {radius}: give a finite number >= 0.")
    twin = prepared_copy(model)
    c = twin.config
    if c.norm == "post" and c.depth == 0:
        raise ValueError(
            "A post-norm ViT without blocks has no LayerNorm before its head: give it depth 1 or "
            "more."
        )
    norm = twin.norm if c.norm == "pre" else twin.blocks[-1].norm2
    Gamma = float(norm.weight.abs().max()) + radius
    row = Gamma * math.sqrt(c.d_model) + float(norm.bias.norm()) + radius
    head = float(spectral(torch.cat([twin.head.weight, twin.head.bias[:, None]], 1))) + radius
    chi_1 = math.sqrt(row**2 + 1)
    return (math.log(c.n_classes) + CROSS_ENTROPY_FIRST * head * chi_1) * ROUNDING
