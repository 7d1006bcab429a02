"""Every rung of the bounds against exact norms on 400 random networks: `make check-bounds`.

Draws architecture, scale, eps, loss and subset at random (seeded), takes the exact spectral norm of
every sample's dense Hessian, and asks each rung that applies. Writes
data/results/check_bounds/ratios.csv, one row for a rung and a depth, and exits with 1 if a bound
lies below an exact norm.
"""

from __future__ import annotations

import argparse
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

CONFIDENCE = 1 - 1e-9  # of the majorant, for the two samples of a case together
SUBSETS = (None, ["head.*"], ["blocks.0.*", "head.*"])


def draw(generator: np.random.Generator) -> tuple[dict, dict]:
    """Sizes of a ViT, and (scale of its random weights, loss, subset)."""
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


def case(number: int) -> list[dict]:
    """The rows (rung, depth, ratio of bound to exact norm) of one random network on two random
    samples; every fourth network is one of the library."""
    generator = np.random.default_rng([2025, number])
    sizes, about = draw(generator)
    torch.manual_seed(number)
    library = number % 4 == 3
    model = Tokens(sizes).double().eval() if library else build_model("vit", **sizes).double()
    if library and about["subset"]:
        about["subset"] = ["head.*"]
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = about["scale"] / math.sqrt(p.shape[-1] if p.ndim == 2 else 1)
            p.copy_(gain + scale * torch.randn_like(p))
    x = 2 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    y = torch.randint(sizes["n_classes"], (2,))
    losses, rows = Losses(model, x, y, about["loss"], parameters=about["subset"]), []
    product = SampleHessians(losses, torch.arange(2))
    units = torch.eye(losses.P, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    H = torch.stack([product(e.contiguous()) for e in units], 2)
    exact = torch.linalg.eigvalsh((H + H.mT) / 2).abs().amax(1)
    for rung in bounds.RUNGS:
        options = (
            {"confidence": CONFIDENCE, "max_steps": 150, "seed": number}
            if rung == "majorant"
            else {}
        )
        try:
            bound = bounds.hessian_bounds(
                model, x, y, about["loss"], rung, parameters=about["subset"], **options
            ).values
        except ValueError:  # the closed form: all weights, pre-norm, cross-entropy
            continue
        for b, e in zip(bound.tolist(), exact.tolist()):
            rows.append(
                {
                    "rung": rung,
                    "depth": sizes["depth"],
                    "ratio": b / e,
                    "violated": b < e * (1 - 1e-9) - 1e-300,
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400)
    cases = parser.parse_args().cases
    found = pd.DataFrame(
        [row for number in tqdm(range(cases), "networks", mininterval=10) for row in case(number)]
    )
    table = (
        found.groupby(["rung", "depth"], sort=False)["ratio"]
        .agg(["count", "min", "median", "max"])
        .reset_index()
    )
    table = table.merge(
        found.groupby(["rung", "depth"])["violated"].sum().rename("violations").reset_index()
    )
    table["place"] = table["rung"].map(bounds.RUNGS.index)
    table = table.sort_values(["place", "depth"]).drop(columns="place")
    with atomic(RESULTS / "check_bounds" / "ratios.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    return int(table["violations"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
