"""Every rung of the bounds against exact norms on 400 random networks: `make check-bounds`.

Draws architecture, scale, zero tensors, eps, loss, subset and a radius at random (seeded), takes
the exact spectral norm of every sample's dense Hessian at the weights and at points of the ball,
and asks each rung that applies. Writes data/results/check_bounds/ratios.csv, one row for a rung, a
depth, and the point or the ball, and exits with 1 if a bound lies below an exact norm.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from utils import bounds
from utils.hessian import Losses
from utils.hessian.losses import SampleHessians
from utils.networks import build_model
from utils.run.files import atomic
from utils.run.layout import RESULTS

ROUNDING = 1e-13  # of a dense Hessian that is zero but for it
CONFIDENCE = 1 - 1e-9  # of the majorant, for the two samples of a case together
SUBSETS = (None, ["head.*"], ["blocks.0.*", "head.*"])
OTHERS = (None, ["head.*"], ["query.*"], ["value.*"])  # of the network with unusual attention


def draw(generator: np.random.Generator) -> tuple[dict, dict]:
    """Sizes of a ViT, and what else is drawn: scale of the weights, loss, subset, radius."""
    choice = generator.choice
    heads = int(choice([1, 2, 4]))
    sizes = {
        "image_size": 4,
        "channels": 1,
        "patch_size": 2,
        "n_classes": int(choice([2, 3, 5])),
        "depth": int(choice([1, 2, 3])),
        "n_heads": heads,
        "d_model": heads * int(choice([1, 2, 4])) if heads > 1 else int(choice([3, 4, 8])),
        "d_ff": int(choice([3, 6, 12])),
        "norm": str(choice(["pre", "post"])),
        "activation": str(choice(["gelu", "gelu_tanh", "relu"])),
        "pool": str(choice(["cls", "mean"])),
        "eps": float(10 ** generator.uniform(-6, -1)),
    }
    if sizes["d_model"] < 3:  # LayerNorm of two numbers is a sign: the lemma asks for three
        sizes["d_model"] = 2 * heads
    about = {
        "scale": float(10 ** generator.uniform(-1, 0.6)),
        "loss": str(choice(["cross_entropy", "mse"])),
        "zeros": float(choice([0, 0, 0.1, 0.4])),  # share of the tensors that are zero
        "fill": float(choice([0, -2, -1e4, -math.inf])),  # the score of a masked key
        "radius": float(10 ** generator.uniform(-4, 0)),
        "alike": float(choice([0, 0, 1])),  # share of an example that all of its tokens have
        "other": int(generator.integers(len(OTHERS))),
    }
    return sizes, about | {"subset": SUBSETS[int(generator.integers(len(SUBSETS)))]}


class Tokens(nn.Module):
    """A network of the library, whose tokens are the rows of an image: nn.MultiheadAttention with a
    causal mask, or nn.TransformerEncoder."""

    def __init__(self, sizes: dict):
        super().__init__()
        d, heads = sizes["d_model"], sizes["n_heads"]
        self.embed = nn.Linear(4, d)
        self.head = nn.Linear(d, sizes["n_classes"])
        self.masked = sizes["pool"] == "cls"
        if self.masked:
            self.mix = nn.MultiheadAttention(d, heads, batch_first=True)
            self.register_buffer("mask", torch.ones(4, 4).triu(1).bool())
            return
        function = "relu" if sizes["activation"] == "relu" else "gelu"
        layer = nn.TransformerEncoderLayer(
            d, heads, sizes["d_ff"], 0.0, function, sizes["eps"], True, sizes["norm"] == "pre"
        )
        self.mix = nn.TransformerEncoder(layer, sizes["depth"], enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x[:, 0])
        if not self.masked:
            return self.head(self.mix(h).mean(1))
        return self.head(self.mix(h, h, h, attn_mask=self.mask, need_weights=False)[0].mean(1))


class Filled(nn.Module):
    """Attention whose masked scores are a number, which need not hide their keys; then a map that
    does not move between two that do. Logits are one row a token."""

    def __init__(self, sizes: dict, fill: float):
        super().__init__()
        d = sizes["d_model"]
        self.query, self.key, self.value = (nn.Linear(4, d, bias=False) for _ in range(3))
        self.register_buffer("mask", torch.ones(4, 4).triu(1).bool())
        self.register_buffer("fixed", 3 * torch.randn(d, d))
        self.after, self.head = nn.Linear(d, d, bias=False), nn.Linear(d, sizes["n_classes"])
        self.fill = fill

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, 0]
        scores = self.query(x) @ self.key(x).mT
        rows = scores.masked_fill(self.mask, self.fill).softmax(-1)
        h = torch.tanh(self.after(rows @ self.value(x)))
        return self.head(nn.functional.linear(h, self.fixed))


def network(number: int, sizes: dict, about: dict) -> nn.Module:
    """Of four in turn two are our ViT, one is of the library, one has unusual attention; weights
    random, some of them zero."""
    kind = number % 4
    if kind < 2:
        model = build_model("vit", **sizes)
    else:
        model = Filled(sizes, about["fill"]) if kind == 2 else Tokens(sizes)
        about["subset"] = OTHERS[about["other"]] if kind == 2 else about["subset"] and ["head.*"]
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = about["scale"] / math.sqrt(p.shape[-1] if p.ndim == 2 else 1)
            p.copy_(gain + scale * torch.randn_like(p))
            if torch.rand(()) < about["zeros"]:
                p.zero_()
    return model.double().eval()


def exact_norms(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, about: dict, step: torch.Tensor | float
) -> torch.Tensor:
    """Norms (n,) of the examples' dense Hessians, all weights moved by `step`."""
    moved = copy.deepcopy(model)
    w = nn.utils.parameters_to_vector(moved.parameters()).detach()
    nn.utils.vector_to_parameters(w + step, moved.parameters())
    losses = Losses(moved, x, y, about["loss"], parameters=about["subset"])
    everyone = torch.arange(losses.n)
    product = SampleHessians(losses, everyone)
    units = torch.eye(losses.P, dtype=torch.float64)[:, None].expand(-1, losses.n, -1)
    H = torch.stack([product(e.contiguous()) for e in units], 2)
    return torch.linalg.eigvalsh((H + H.mT) / 2).abs().amax(1)


def case(number: int) -> list[dict]:
    """The rows (rung, depth, radius, ratio of bound to exact norm) of one random network on two
    random samples: at its weights, and on a ball around them at two random points of its edge."""
    generator = np.random.default_rng([2026, number])
    sizes, about = draw(generator)
    torch.manual_seed(number)
    model = network(number, sizes, about)
    x = 2 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x = x + about["alike"] * (x[:, :, :1] + 1e-3 * x - x)
    tokens = (2, 4) if isinstance(model, Filled) else (2,)
    y = torch.randint(sizes["n_classes"], tokens)
    P = sum(p.numel() for p in model.parameters())
    rows = []
    for radius in (0.0, about["radius"]):
        exact = exact_norms(model, x, y, about, 0.0)
        for direction in torch.randn(2 if radius else 0, P, dtype=torch.float64):
            step = radius * direction / direction.norm()
            exact = torch.maximum(exact, exact_norms(model, x, y, about, step))
        for rung in bounds.RUNGS[: 3 if radius else None]:
            options: dict = {"radius": radius, "parameters": about["subset"]}
            if rung == "majorant":
                options |= {"confidence": CONFIDENCE, "max_steps": 150, "seed": number}
            try:
                bound = bounds.hessian_bounds(model, x, y, about["loss"], rung, **options).values
            except ValueError:  # the closed form: all weights, pre-norm, cross-entropy
                continue
            for b, e in zip(bound.tolist(), exact.tolist()):
                about_it = {"rung": rung, "depth": sizes["depth"], "radius": radius > 0}
                violated = b < e * (1 - 1e-9) - ROUNDING
                rows.append(about_it | {"ratio": b / e if e else 1.0, "violated": violated})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400)
    cases = parser.parse_args().cases
    found = pd.DataFrame(
        [row for number in tqdm(range(cases), "networks", mininterval=10) for row in case(number)]
    )
    groups = found.groupby(["rung", "depth", "radius"], sort=False)
    ratio = groups["ratio"]
    columns = {name: getattr(ratio, name)() for name in ("count", "min", "median", "max")}
    table = pd.DataFrame(columns | {"violations": groups["violated"].sum()}).reset_index()
    table["place"] = table["rung"].map(bounds.RUNGS.index)
    table = table.sort_values(["radius", "place", "depth"]).drop(columns="place")
    table["radius"] = table["radius"].map({False: "a point", True: "a ball"})
    with atomic(RESULTS / "check_bounds" / "ratios.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    return int(table["violations"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
