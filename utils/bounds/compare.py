"""What notebook 04 measures: every rung beside the measured norm, with its cost, and its growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from utils.bounds.ladder import Bound, hessian_bounds
from utils.bounds.published import closing_the_curvature_gap, unraveling_the_hessian
from utils.bounds.subject import subject
from utils.bounds.walk import measured_norms
from utils.hessian import Losses, per_sample_hessian_norms
from utils.hessian.losses import SampleHessians
from utils.hessian.operations import operations
from utils.networks import build_model

DENSE = ("tangents",)  # rungs that go example by example
SWEPT = ("closed_form", "prior", "activations", "majorant")  # quick enough for many networks
Part = tuple[Tensor, Tensor]


def product_cost(network: nn.Module, x: Tensor, y: Tensor, loss: str) -> float:
    """Operations of one product of an example's Hessian with a vector, the unit of every cost.

    network, loss  as everywhere
    x, y           the examples over which it is averaged (n, ...), (n,)

    >>> product_cost(nn.Linear(2, 3), torch.ones(4, 2), torch.zeros(4).long(), "mse") > 0
    True
    """
    losses = Losses(network, x, y, loss)
    hessians = SampleHessians(losses, torch.arange(losses.n, device=losses.x.device))
    return operations(hessians, losses.w.new_ones(losses.n, losses.P))[1] / losses.n


def bound_and_cost(
    network: nn.Module, x: Tensor, y: Tensor, loss: str, rung: str, **options: Any
) -> tuple[Bound, float]:
    """A bound of `hessian_bounds`, arguments as there, and its operations for all examples
    together, those of reading and checking the network aside.

    >>> x, y = torch.ones(1, 2).double(), torch.tensor([0])
    >>> bound_and_cost(nn.Linear(2, 3).double(), x, y, "cross_entropy", "majorant")[1] > 0
    True
    """
    bound, cost = operations(hessian_bounds, network, x, y, loss, rung, **options)
    return bound, cost - operations(subject, network, x, y, loss)[1]


@dataclass
class Comparison:
    """Bounds beside measured norms.

    network  whose Hessians; `loss` of its examples
    parts    name -> inputs and labels, as in the table of measured norms
    norms    measured norms: columns part, index, lower, upper
    unit     operations of one product
    rows     one for each part, example and rung: part, index, rung, bound, measured, products
    bounds   (rung, part) -> what was computed; `refusals`: rung -> why there is no number
    """

    network: nn.Module
    loss: str
    parts: dict[str, Part]
    norms: pd.DataFrame
    unit: float
    rows: list[pd.DataFrame] = field(default_factory=list)
    bounds: dict[tuple[str, str], Bound] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def ask(self, rung: str, part: str, n: int, **options: Any) -> None:
        """Bound the first n examples of a part; options: as of `hessian_bounds`."""
        known = self._first(part, n)
        x, y = (t[: len(known)] for t in self.parts[part])
        try:
            bound, cost = bound_and_cost(self.network, x, y, self.loss, rung, **options)
        except ValueError as reason:
            self.refusals[rung] = str(reason)
            return
        self.bounds[rung, part] = bound
        self._add(rung, known, bound.values, cost / len(known))

    def ask_with_data(self, part: str, n: int) -> int:
        """The prior of the first n examples of a part with the numbers of the chain that occur on
        all of it; how many these are."""
        x, y = self.parts[part]
        numbers, cost = operations(measured_norms, self.network, x)
        cost -= operations(subject, self.network, x, y, self.loss)[1]
        known = self._first(part, n)
        rows = slice(len(known))
        bound = hessian_bounds(self.network, x[rows], y[rows], self.loss, "prior", measured=numbers)
        self.bounds["prior, measured", part] = bound
        self._add("prior, measured", known, bound.values, cost / len(x))
        return len(numbers.values)

    def add_certified(self, part: str, n: int) -> None:
        """The first n certified upper ends among the measured norms of a part, and the products
        that one takes, in the mean over these."""
        known = self._first(part, n, self.norms["upper"].notna())
        x, y = (t[: len(known)] for t in self.parts[part])
        steps = per_sample_hessian_norms(self.network, x, y, self.loss, certify=True).iterations
        cost = float(steps.double().mean()) * self.unit
        self._add("certified", known, torch.tensor(known["upper"].to_numpy()), cost)

    def _first(self, part: str, n: int, usable: pd.Series | bool = True) -> pd.DataFrame:
        return self.norms[usable & (self.norms["part"] == part)].head(n)

    def _add(self, rung: str, known: pd.DataFrame, values: Tensor, cost: float) -> None:
        rows = known[["part", "index"]].assign(rung=rung, bound=values.numpy())
        products = cost / self.unit if self.unit else np.nan
        self.rows.append(rows.assign(measured=known["lower"], products=products))

    def table(self) -> pd.DataFrame:
        """All rows, with ratio = bound / measured."""
        table = pd.concat(self.rows, ignore_index=True)
        return table.assign(ratio=table["bound"] / table["measured"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each rung, the loosest first: examples, least, median and largest ratio,
    products.

    table  of `Comparison.table`

    >>> row = {"rung": "prior", "ratio": 2.0, "products": 1.0}
    >>> summary(pd.DataFrame([row, row | {"ratio": 4.0}]))["median"].tolist()
    [3.0]
    """
    rungs = table.groupby("rung", sort=False)
    found = rungs.agg(
        examples=("ratio", "count"),
        least=("ratio", "min"),
        median=("ratio", "median"),
        largest=("ratio", "max"),
        products=("products", "mean"),
    )
    return found.sort_values("median", ascending=False)


# --- growth with the architecture -----------------------------------------------------------------


def grid_of(config: dict, sweep: str) -> list:
    """The values of a sweep that fit the sizes `config` of a ViT.

    >>> grid_of({"image_size": 8, "d_model": 16, "n_heads": 2, "patch_size": 2}, "tokens")
    [4, 2, 1]
    """
    side = config["image_size"]
    patches = [s for s in range(side, 0, -1) if side % s == 0 and 4 <= (side // s) ** 2 <= 64]
    grids: dict[str, list] = {"depth": [1, 2, 4], "width": [16, 32, 64], "heads": [1, 2, 4, 8]}
    grids |= {"tokens": patches, "scale": [0.5, 1, 2]}
    grid = grids[sweep]
    if sweep == "width":
        return [d for d in grid if d % config["n_heads"] == 0]
    return [h for h in grid if config["d_model"] % h == 0] if sweep == "heads" else grid


def untrained(config: dict, sweep: str, value: float, seed: int) -> nn.Module:
    """A fresh ViT of the sizes `config`, one of them (or the scale of all matrices) replaced.

    sweep  which: depth, width, heads, tokens or scale
    value  in its place; of tokens the side of a patch
    seed   of the weights

    >>> sizes = {"image_size": 2, "channels": 1, "patch_size": 1, "n_classes": 2, "depth": 1}
    >>> sizes |= {"n_heads": 1, "d_model": 2, "d_ff": 2}
    >>> len(untrained(sizes, "depth", 3, seed=0).blocks)
    3
    """
    names = {"depth": "depth", "width": "d_model", "heads": "n_heads", "tokens": "patch_size"}
    sizes = dict(config)
    if sweep != "scale":
        sizes[names[sweep]] = value
    if sweep == "width":
        sizes["d_ff"] = 2 * value
    torch.manual_seed(seed)
    network = build_model("vit", **sizes).double()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(value if sweep == "scale" and p.ndim == 2 else 1)
    return network


def growth(
    config: dict, sweeps: Sequence[str], rungs: Sequence[str], x: Tensor, y: Tensor, seed: int
) -> pd.DataFrame:
    """log10 of the median bound and of the median measured norm over x, y for untrained networks
    that differ in one size: columns sweep, value, rung, log10. Cross-entropy.

    config  sizes of the ViT
    sweeps  of depth, width, heads, tokens, scale
    rungs   whose bounds
    seed    of the weights

    >>> sizes = {"image_size": 2, "channels": 1, "patch_size": 1, "n_classes": 2, "depth": 1}
    >>> sizes |= {"n_heads": 1, "d_model": 2, "d_ff": 2, "norm": "pre"}
    >>> x, y = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0])
    >>> list(growth(sizes, ["heads"], ["prior"], x, y, seed=0)["rung"])
    ['measured', 'prior', 'measured', 'prior']
    """
    rows = []
    for sweep in sweeps:
        for value in grid_of(config, sweep):
            network = untrained(config, sweep, value, seed)
            at = len(network.pos) if sweep == "tokens" else value
            norm = per_sample_hessian_norms(network, x, y, seed=seed).value.median()
            rows.append((sweep, at, "measured", float(norm.log10())))
            for rung in rungs:
                if rung == "closed_form" and config["norm"] != "pre":
                    continue
                bound = hessian_bounds(network, x, y, rung=rung).values.median()
                rows.append((sweep, at, rung, float(bound.log10())))
    return pd.DataFrame(rows, columns=["sweep", "value", "rung", "log10"])


def powers(table: pd.DataFrame) -> pd.DataFrame:
    """Slopes by least squares, a row for each rung: decades a block for the depth, decades a decade
    for the others.

    table  of `growth`

    >>> rows = [("width", 10, "prior", 1.0), ("width", 100, "prior", 3.0)]
    >>> table = pd.DataFrame(rows, columns=["sweep", "value", "rung", "log10"])
    >>> float(powers(table).loc["prior", "width"])
    2.0
    """
    slopes = {}
    for (rung, sweep), curve in table.groupby(["rung", "sweep"], sort=False):
        along = curve["value"] if sweep == "depth" else np.log10(curve["value"].astype(float))
        if len(curve) > 1:
            slopes[rung, sweep] = np.polyfit(along, curve["log10"], 1)[0].round(12)
    found = pd.Series(slopes).unstack()
    return found.reindex(index=table["rung"].unique(), columns=table["sweep"].unique())


# --- published constants --------------------------------------------------------------------------


def published(x: Tensor, n_classes: int, seed: int) -> pd.DataFrame:
    """The two printed constants beside exact norms in their own settings: columns constant,
    printed, exact norm, printed / exact.

    x          inputs (n, ...) of which the first is used
    n_classes  logits of the network
    seed       of the weights

    Attention with squared error on random weights and on the family of the remark; a ReLU network
    without biases. Source: Remark (rem:published).
    """
    torch.manual_seed(seed)
    rows = []
    for size in (0.3, 1.0):
        X = torch.randn(17, 8).double()
        W = [size * torch.randn(8, 8).double() / 8**0.5 for _ in range(3)]
        target = torch.randn(17, 8).double()
        rows.append((f"CCG theorem 1, weights of size {size}", *_attention_case(X, W, target)))
    L = 64  # uniform attention is what the proof assumes, and this is not
    X = torch.zeros(L, 1).double()
    X[0] = 1
    kappa = torch.full((1, 1), np.log(L - 1) ** 0.5).double()
    case = _attention_case(X, [kappa, kappa, 0 * kappa], 1.0e6 * X)
    rows.append((f"CCG theorem 1, counterexample L = {L}", *case))
    x = x[:1].flatten(1).double()
    torch.manual_seed(seed)
    sizes = {"d_in": x.shape[1], "width": 8, "depth": 1, "n_classes": n_classes}
    network = build_model("mlp", **sizes, activation="relu", bias=False).double()
    weights = [p.detach().clone() for p in network.parameters()]
    for size in (0.1, 1.0):
        with torch.no_grad():
            for p, W in zip(network.parameters(), weights, strict=True):
                p.copy_(size * W)
        printed = unraveling_the_hessian([size * W for W in weights], x).item()
        label = torch.zeros(1, dtype=torch.long)
        exact = per_sample_hessian_norms(network, x, label, certify=True).lower.item()
        rows.append((f"UH theorem 1, ReLU weights times {size}", printed, exact))
    table = pd.DataFrame(rows, columns=["constant", "printed", "exact norm"])
    return table.assign(**{"printed / exact": table["printed"] / table["exact norm"]})


def _attention_case(X: Tensor, W: list[Tensor], target: Tensor) -> tuple[float, float]:
    """The printed constant and the exact norm for softmax(X W_Q W_K^T X^T / sqrt d_K) X W_V."""

    def value(w: Tensor) -> Tensor:
        parts = w.split([m.numel() for m in W])
        Q, K, V = (part.reshape(m.shape) for part, m in zip(parts, W, strict=True))
        A = (X @ Q @ K.T @ X.T / K.shape[1] ** 0.5).softmax(-1)
        return (A @ X @ V - target).square().sum() / target.numel()

    H = torch.autograd.functional.hessian(value, torch.cat([m.reshape(-1) for m in W]))
    Q, K, V = W
    printed = closing_the_curvature_gap(X, Q, K, V, target)
    return printed, float(torch.linalg.matrix_norm(H, 2))
