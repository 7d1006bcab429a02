"""How far the comparison system reaches: the bound on a ball against the centre, a search, and the a-priori bound.

Trains a tiny ViT (width 8, 300 steps of Adam on noisy prototypes) and a ViT of width 16 on the digits (the recipe of
notebook 02 without its polishing), of depth 1 and 2 each. Asks for one sample of each model the bound of ||H_i|| over
the ball, in all weights and in some, at radii from 1e-5 to 1. `found` is the largest norm that a search over the ball
has met: a random point, then an ascent. Writes data/results/check_bounds/ball.csv, one row a radius, and exits with 1
if a bound lies below what was found. Takes about five minutes: `python tests/check_comparison.py`. With `--paths`, in
their place: how many certificates the whole way of Adam takes, from the initial weights of the tiny models through
every step to the trained ones, written to data/results/check_bounds/paths.csv: ten minutes for `--depths 1`, hours for
depth 2.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torch.func import functional_call

from utils import bounds, runs, training
from utils.comparison import certified_path, hessian_norm_on_ball
from utils.data import load_dataset
from utils.models import build_for_data, build_model, loss_from_logits

RADII = [1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0]


def tiny(depth: int, passed: list | None = None):
    """(model, x, y): width 8, two heads, five tokens, 300 steps of Adam, each kept in `passed`."""
    torch.manual_seed(depth)
    sizes = dict(image_size=4, channels=1, patch_size=2, n_classes=3, n_heads=2, d_model=8, d_ff=16)
    model = build_model("vit", depth=depth, **sizes).double()
    y = torch.randint(0, 3, (120,))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)[y] + 1.5 * torch.randn(120, 1, 4, 4, dtype=torch.float64)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        if passed is not None:
            passed.append({name: p.detach().clone() for name, p in model.named_parameters()})
        optimiser.zero_grad()
        loss_from_logits(model(x), y).mean().backward()
        optimiser.step()
    return model, x, y


def paths(depths: list[int], path: Path, factors=(10.0, 2.0)) -> None:
    """One row a depth and factor: certificates along the polygon of all iterates, for the Hessian in all weights."""
    for depth, factor in itertools.product(depths, factors):
        points: list[dict] = []
        model, x, y = tiny(depth, points)
        points.append({name: p.detach().clone() for name, p in model.named_parameters()})
        ends = [torch.cat([t.flatten() for t in points[i].values()]) for i in (0, -1)]
        found = certified_path(model, x[:1], y[:1], points, factor=factor, most=2000)
        row = {"model": "tiny", "depth": depth, "factor": factor, "steps": len(points) - 1, "length": found.length}
        row |= {"chord": (ends[1] - ends[0]).norm().item(), "covered": found.covered, "certificates": found.measured}
        row |= {"smallest_radius": float(found.radii.min()), "largest_bound": float(found.largest[0])}
        print(row, flush=True)
        table = pd.DataFrame([row])
        if path.exists():
            old = pd.read_csv(path)
            table = pd.concat([old[(old["depth"] != depth) | (old["factor"] != factor)], table])
        with runs.atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


def digits(depth: int):
    """(model, x, y): width 16, the training part of the digits, by notebook 02's defaults without polishing."""
    dataset = load_dataset("digits")
    torch.manual_seed(0)
    sizes = dict(patch_size=2, n_heads=4, d_model=16, d_ff=32, norm="pre", activation="gelu", pool="cls", eps=1e-5)
    model = build_for_data("vit", dataset.info, depth=depth, **sizes)
    x, y = dataset.x_train, dataset.y_train
    recipe = dict(loss="cross_entropy", l2=0.1, epochs=40, batch_size=64, seed=0, learning_rate=3e-3)
    training.train(model, x, y, polish_steps=0, **recipe)
    return model.double(), x.double(), y


def subsets(model, depth: int, generator: torch.Generator) -> dict[str, dict]:
    """What moves, as options of `hessian_norm_on_ball`: the last two by directions."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    line = {name: torch.randn(1, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    length = math.sqrt(sum(float(t.square().sum()) for t in line.values()))
    adapted = {}  # W + B A with A (2, in) orthonormal and B moving: each coordinate of each B is a direction
    names = [f"blocks.{depth - 1}.attention.{part}.weight" for part in ("query", "value")]
    q = sum(2 * shapes[name][0] for name in names)
    first = 0
    for name in names:
        out, inner = shapes[name]
        A = torch.linalg.qr(torch.randn(inner, 2, generator=generator, dtype=torch.float64)).Q.T
        columns = torch.zeros(q, out, inner, dtype=torch.float64)
        for i in range(out):
            columns[first + 2 * i : first + 2 * i + 2, i] = A
        adapted[name], first = columns, first + 2 * out
    return {
        "all": {},
        "head": {"parameters": ["head.*"]},
        "last block": {"parameters": [f"blocks.{depth - 1}.*"]},
        "LoRA, rank 2": {"directions": adapted},
        "one direction": {"directions": {name: t / length for name, t in line.items()}},
    }


class Restricted:
    """c -> l(w_0 + U c) of one sample, c the chosen parameters or the coordinates of the directions."""

    def __init__(self, model, x, y, options: dict):
        self.model, self.x, self.y, self.given = model, x, y, options.get("directions")
        self.point = {name: p.detach() for name, p in model.named_parameters()}
        stems = [pattern.removesuffix("*") for pattern in options.get("parameters", [""])]
        self.names = [name for name in self.point if name.startswith(tuple(stems))]
        sizes = [self.point[name].numel() for name in self.names]
        self.sizes = sizes if self.given is None else [len(next(iter(self.given.values())))]

    def __call__(self, c):
        if self.given is None:
            moved = {n: self.point[n] + t.view_as(self.point[n]) for n, t in zip(self.names, c.split(self.sizes))}
        else:
            moved = {n: self.point[n] + torch.tensordot(c, t, 1) for n, t in self.given.items()}
        return loss_from_logits(functional_call(self.model, self.point | moved, (self.x,)), self.y)[0]

    def search(self, R: float, v, generator, points: int = 5) -> tuple[float, torch.Tensor]:
        """(largest |v^T H(c) v| met over |c| <= R, the last v): the centre, a random point, then steps of ascent."""
        best, c = 0.0, torch.zeros_like(v)
        for point in range(points):
            c.requires_grad_()
            (g,) = torch.autograd.grad(self(c), c, create_graph=True)
            for _ in range(4):  # power steps
                (Hv,) = torch.autograd.grad(g @ v, c, retain_graph=True)
                value, v = float(v @ Hv), Hv / Hv.norm().clamp_min(1e-300)
                best = max(best, abs(value))
            if point == 0:
                c = torch.randn(len(v), generator=generator, dtype=torch.float64)
            else:
                (Hv,) = torch.autograd.grad(g @ v, c, create_graph=True)
                c = math.copysign(1.0, value) * torch.autograd.grad(Hv @ v, c)[0]
            c = R * c / c.norm().clamp_min(1e-300)
        return best, v


def rows_of(name: str, depth: int, model, x, y) -> list[dict]:
    generator, rows = torch.Generator().manual_seed(0), []
    width = model.config.d_model
    for subset, options in subsets(model, depth, generator).items():
        bound = hessian_norm_on_ball(model, x, y, RADII, ceiling=1e4, **options)
        restricted = Restricted(model, x, y, options)
        v = torch.randn(sum(restricted.sizes), generator=generator, dtype=torch.float64)
        v = restricted.search(0.0, v / v.norm(), generator)[1]
        for k, radius in enumerate(RADII):
            prior = math.nan  # the a-priori rung knows groups, not directions
            if "directions" not in options:
                prior = float(bounds.hessian_norm_bounds(model, x, y, rung="prior", radius=radius, **options).values[0])
            value, centre = float(bound.values[0, k]), float(bound.centre[0])
            found, _ = restricted.search(radius, v, generator)
            rows.append(
                {"model": name, "depth": depth, "width": width, "subset": subset, "radius": radius, "bound": value}
                | {"centre": centre, "found": found, "prior": prior}
                | {"bound_to_centre": value / centre, "bound_to_found": value / found, "prior_to_bound": prior / value}
                | {f"reach_{f:g}": float(r) for f, r in zip(bound.factors, bound.reach[0])}
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["tiny", "digits"], choices=["tiny", "digits"])
    parser.add_argument("--depths", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--paths", action="store_true", help="certify the path of training instead of balls")
    arguments = parser.parse_args()
    if arguments.paths:
        paths(arguments.depths, ROOT / runs.RESULTS / "check_bounds" / "paths.csv")
        return 0
    path, failed = ROOT / runs.RESULTS / "check_bounds" / "ball.csv", False
    for name, depth in tqdm(list(itertools.product(arguments.models, arguments.depths)), "models"):
        model, x, y = {"tiny": tiny, "digits": digits}[name](depth)
        table = pd.DataFrame(rows_of(name, depth, model, x[:1], y[:1]))
        failed |= bool((table["found"] > table["bound"] * (1 + 1e-9)).any())
        reach = [c for c in table if c.startswith("reach")]
        print(table.groupby(["model", "depth", "subset"], sort=False)[["centre", *reach]].first().to_string())
        if path.exists():  # what this run does not measure stays
            old = pd.read_csv(path)
            table = pd.concat([old[(old["model"] != name) | (old["depth"] != depth)], table])
        table = table.sort_values(["model", "depth"], ascending=[False, True], kind="stable")
        with runs.atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
