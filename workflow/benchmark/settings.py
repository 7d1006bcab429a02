"""What is measured: tasks, models, targets, sizes; the digits and the networks."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.data import load_dataset
from utils.networks import ViT, ViTConfig, load_state, read_weights
from utils.networks.losses import loss_from_logits
from utils.networks.training import train
from utils.run.files import atomic
from utils.run.layout import RESULTS, RUNS

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / RUNS / "_benchmark"
PAGE = ROOT / "docs" / "benchmark.md"
CSV = ROOT / RESULTS / "benchmarks" / "benchmark.csv"
MARKERS = ("<!-- benchmark -->", "<!-- /benchmark -->")

VIT = {"image_size": 8, "channels": 1, "patch_size": 2, "n_classes": 10, "n_heads": 4}
SMALL, MEDIUM = {"d_model": 32, "depth": 2, "d_ff": 64}, {"d_model": 64, "depth": 4, "d_ff": 256}
MODELS = {  # sizes, and how it is trained; "steps": that many steps of plain Adam, no penalty
    "small-trained": SMALL
    | {"l2": 0.1, "epochs": 40, "polish_steps": 500},  # the defaults of notebook 02
    "small-40-step": SMALL | {"steps": 40},
    "medium": MEDIUM | {"l2": 0.1, "epochs": 10, "polish_steps": 0},
}
TASKS = {  # task: (its name in the table, what ms_per_unit counts)
    "norms": ("norms of h_i, n = {}", "sample"),
    "norm": ("norm of H_k, k = {}", "norm"),
    "density": ("density of H_n, n = {}", "density"),
    "losses": ("loss steps, n = {}", "all steps of all orders"),
    "memory": ("", "sample"),
}
# task: what all its methods are compared to, then what "ours" alone is compared to as well
BASES = {
    "norms": ("PyHessian", "PyHessian, tol 1e-6"),
    "norm": ("PyHessian, data loader", "PyHessian, full batch"),
    "density": ("PyHessian, adapted",),
    "losses": ("batch size 1, running means", "one pass, every mean anew"),
}
# (task, place of the base in BASES, model or None for every one): ratio that "ours" in float64
# aims at
TARGETS = {
    ("norms", 0, "small-trained"): 25,
    ("norms", 0, "small-40-step"): 50,
    ("norms", 0, "medium"): 10,
    ("norm", 0, None): 2.5,
    ("losses", 0, None): 40,
    ("losses", 1, None): 12,
}
COLUMNS = """task model dtype method base unit parameters n chunk rounds ms_per_unit
    ratio ratio_low ratio_high target
reached error_median error_worst within_1e-3 not_converged peak_mib device torch threads""".split()


@dataclass(frozen=True)
class Sizes:
    """Samples of norms and density (n), of norm and losses (k), of a slow method (share) and a very
    slow one (few) in a round; probes and steps of the density, orders of the losses, the two
    numbers of samples of memory."""

    n: int = 256
    k: int = 1024
    share: int = 24
    few: int = 8
    probes: int = 2
    steps: int = 40
    orders: int = 200
    memory: tuple[int, int] = (500, 2000)
    rounds: int = 5
    quick: bool = False


QUICK = Sizes(n=4, k=16, share=1, few=1, steps=5, orders=10, memory=(4, 8), rounds=1, quick=True)


@dataclass
class Method:
    """A way to the result. call(rows) -> (values, converged or None): a value a sample, or those of
    the whole task.

    share: samples a round, None for all. chunk: samples at once, None where the budget of `Losses`
    decides."""

    name: str
    call: Callable[[Tensor], tuple] | None
    dtype: torch.dtype = torch.float64
    share: int | None = None
    chunk: int | None = None
    ms: list[float] = field(default_factory=list)  # per unit, one a round
    found: dict[int, tuple[float, float]] = field(
        default_factory=dict
    )  # sample -> value, not converged


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """The training part of the digits, 1078 samples in random order, in float64."""
    digits = load_dataset("digits")
    return digits.x_train.double(), digits.y_train


def network(name: str, quick: bool = False) -> ViT:
    """The model of that name, trained here or read from data/runs/_benchmark; `quick` trains
    little, keeps nothing."""
    recipe = dict(MODELS[name])
    key = hashlib.sha256(json.dumps([VIT, recipe]).encode()).hexdigest()[:10]
    path = CACHE / f"{name}-{key}.safetensors"
    torch.manual_seed(0)
    net = ViT(ViTConfig(**VIT, **{size: recipe.pop(size) for size in SMALL}))
    if path.is_file() and not quick:
        return load_state(net, read_weights(str(path)))
    say(f"training {name}")
    if "steps" in recipe:
        adam(net.double(), *data(), recipe["steps"])
    else:
        train(net, *data(), **recipe | ({"epochs": 1, "polish_steps": 0} if quick else {}))
    if not quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file(net.state_dict(), temporary)
    return net


def adam(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """That many steps at 3e-3 on batches of 64: the Hessians are indefinite still."""
    optimizer, generator = (
        torch.optim.Adam(net.parameters(), lr=3e-3),
        torch.Generator().manual_seed(0),
    )
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:64]
        optimizer.zero_grad()
        loss_from_logits(net(x[rows]), y[rows]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
