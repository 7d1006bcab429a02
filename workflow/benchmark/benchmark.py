"""Speed and accuracy of this repository beside other software, on real digits: `python -m
workflow.benchmark.benchmark`.

One process, one thread, on the CPU or a GPU. The methods take turns (A B C A B C ...), and a ratio
compares two methods in the same round, so that a machine that slows down in between does not move
it. Slow methods get a block of the samples, another one in every round. README.md in this folder
says what is compared, with which settings, and what every column means.
"""

from __future__ import annotations

import os

os.environ.update(
    dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
)

import argparse
import copy
import functools
import gc
import hashlib
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from pyhessian import hessian
from safetensors.torch import save_file
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from utils import convergence, curvature, pyhessian_adapter
from utils.data import load_dataset
from utils.models import ViT, ViTConfig, load_state, loss_from_logits, prepared_copy, read_weights
from utils.run.files import atomic
from utils.run.layout import RESULTS, RUNS
from utils.training import train
from workflow.pages import fill

ROOT = Path(__file__).resolve().parents[2]
CACHE, PAGE = ROOT / RUNS / "_benchmark", ROOT / "README.md"
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


# --- models and data ------------------------------------------------------------------------------


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


class Plain(ViT):
    """The same network, unknown to the calculus, which takes the exact type only: what any module
    of a user gets."""


def plain(net: ViT) -> Plain:
    twin = copy.deepcopy(net)
    twin.__class__ = Plain
    return twin


# --- the methods ----------------------------------------------------------------------------------


def ours(net, x, y, dtype=torch.float64, **options):
    """curvature.per_sample_hessian_norms as a method."""

    def call(rows):
        found = curvature.per_sample_hessian_norms(net, x[rows], y[rows], dtype=dtype, **options)
        return found.value, found.converged

    return call


def pyhessian(
    net, x, y, dtype=torch.float64, *, each: bool, batch: int | None = None, tol=1e-3, steps=100
):
    """PyHessian's power iteration alone: one sample after the other, the whole batch, or a data
    loader.

    Its start vectors take torch's default dtype; .grad is cleared, or a second run would add to the
    first one's."""
    net, x, mean = prepared_copy(net, dtype), x.to(dtype), nn.CrossEntropyLoss()

    def one(rows):
        net.zero_grad(set_to_none=True)
        loader = batch and DataLoader(TensorDataset(x[rows], y[rows]), batch_size=batch)
        about = {"dataloader": loader} if loader else {"data": (x[rows], y[rows])}
        return abs(
            hessian(net, mean, cuda=x.is_cuda, **about).eigenvalues(maxIter=steps, tol=tol)[0][0]
        )

    def call(rows):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return [one(r) for r in (rows.split(1) if each else [rows])], None
        finally:
            torch.set_default_dtype(default)

    return call


def arpack(operator) -> tuple[float, bool]:
    """|largest eigenvalue| by SciPy's eigsh, at the tolerance that is our default, and whether it
    converged."""
    try:
        return abs(eigsh(operator, k=1, which="LM", tol=1e-4, return_eigenvectors=False)[0]), True
    except ArpackNoConvergence:
        return math.nan, False


def arpack_of_ours(net, x, y):
    """eigsh on our product with the Hessian of one sample."""

    def one(losses, i):
        product, local = curvature.SampleHessians(losses, torch.tensor([i])), torch.tensor([0])

        def matvec(v):
            return product(torch.from_numpy(v.reshape(1, -1).copy()), local)[0].numpy()

        return arpack(LinearOperator((losses.P, losses.P), matvec, dtype=np.float64))

    def call(rows):
        losses = curvature.Losses(net, x[rows], y[rows])
        return tuple(zip(*(one(losses, i) for i in range(len(rows)))))

    return call


def curvlinops(net, x, y, *, each: bool, batch: int = 1):
    """eigsh on the Hessian of curvlinops, its checks of determinism switched off; None where it is
    not installed."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError as error:
        say(f"curvlinops is left out ({error}): requirements-benchmark.txt installs it.")
        return None
    net, mean = prepared_copy(net), nn.CrossEntropyLoss()

    def one(rows):
        parts = [(x[r], y[r]) for r in rows.split(batch)]
        about = {"check_deterministic": False, "num_data": len(rows)}
        operator = HessianLinearOperator(net, mean, list(net.parameters()), parts, **about)
        return arpack(operator.to_scipy(dtype=np.float64))

    return lambda rows: tuple(zip(*(one(r) for r in (rows.split(1) if each else [rows]))))


# --- the tasks: (methods, truth); the first method is "ours"
# ----------------------------------------


def sample_norms(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """Spectral norms of the Hessians h_i of single samples.

    The truth takes another road: products by jvp(grad), a random start, every step orthogonalised,
    a residual of 1e-10; where a start at the gradient ends higher, that. Both are Rayleigh
    quotients, that is lower ends."""
    losses, truth, generator = (
        curvature.Losses(plain(net), x, y),
        [],
        torch.Generator().manual_seed(1),
    )

    def done(ritz, step):
        near = 1e-10 * ritz.value
        return (
            (ritz.residual <= near)
            & ((ritz.opposite <= ritz.value) | (ritz.other <= near))
            & (step >= 8)
        )

    for rows in torch.arange(len(x)).split(max(1, curvature.MEMORY // (800 * losses.P))):
        start = torch.randn(len(rows), losses.P, dtype=torch.float64, generator=generator)
        product, start = curvature.SampleHessians(losses, rows), start.to(x.device)
        truth.append(curvature.lanczos(product, start, max_steps=200, done=done).value.cpu())
    again = curvature.per_sample_hessian_norms(plain(net), x, y, tolerance=1e-8).value
    single, share = torch.float32, sizes.share
    methods = [
        Method("ours", ours(net, x, y)),
        Method("ours, any module", ours(plain(net), x, y)),
        Method("ours, certified", ours(net, x, y, certify=True), share=3 * share),
        Method(BASES["norms"][0], pyhessian(net, x, y, each=True), share=share, chunk=1),
        Method(
            BASES["norms"][1],
            pyhessian(net, x, y, each=True, tol=1e-6, steps=1000),
            share=sizes.few,
            chunk=1,
        ),
        Method("eigsh on our product", arpack_of_ours(net, x, y), share=share, chunk=1),
        Method("eigsh on curvlinops", curvlinops(net, x, y, each=True), share=sizes.few, chunk=1),
        Method("ours", ours(net, x, y, single), single),
        Method("ours, any module", ours(plain(net), x, y, single), single),
        Method(BASES["norms"][0], pyhessian(net, x, y, single, each=True), single, share, 1),
        Method(
            BASES["norms"][1],
            pyhessian(net, x, y, single, each=True, tol=1e-6, steps=1000),
            single,
            sizes.few,
            1,
        ),
    ]
    return methods, torch.maximum(torch.cat(truth), again)


def full_norm(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """Spectral norm of H_k; the truth by jvp(grad), from another start, to a residual of 1e-7."""

    def lanczos(rows):
        found = curvature.hessian_norm(net, x[rows], y[rows])
        return [found.value], [found.converged]

    methods = [
        Method("ours", lanczos),
        Method(BASES["norm"][1], pyhessian(net, x, y, each=False), chunk=len(x)),
        Method(BASES["norm"][0], pyhessian(net, x, y, each=False, batch=128), chunk=128),
        Method("eigsh on curvlinops", curvlinops(net, x, y, each=False, batch=128), chunk=128),
    ]
    truth = curvature.hessian_norm(plain(net), x, y, tolerance=1e-7, max_steps=300, seed=1).value
    return methods, torch.tensor([truth], dtype=torch.float64)


def spectrum(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """Spectral density of H_n; the values are its moments tr H and tr H^2, the truth those of many
    more probes."""
    options = {"probes": sizes.probes, "steps": sizes.steps}

    def moments(found):
        return [found.moment(1)[0], found.moment(2)[0]], None

    def adapted(rows):
        losses = curvature.Losses(net, x[rows], y[rows])
        return moments(
            curvature.SpectralDensity(*pyhessian_adapter.density(losses, **options), losses.P)
        )

    methods = [
        Method(
            "ours",
            lambda rows: moments(curvature.spectral_density(net, x[rows], y[rows], **options)),
        ),
        Method(BASES["density"][0], adapted, chunk=len(x)),
    ]
    losses, generator = curvature.Losses(net, x, y), torch.Generator().manual_seed(1)
    signs = (
        torch.randint(2, (8 if sizes.quick else 128, losses.P), generator=generator).to(losses.w)
        * 2
        - 1
    )
    product = losses.hessian()
    pairs = [(v @ z, z @ z) for v in signs for z in [product(v)]]
    return methods, torch.tensor(pairs, dtype=torch.float64).mean(0)


def loss_steps(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """All L_{k+1} - L_k in random orders; the truth in extended precision from losses taken one by
    one."""
    twin, criterion = prepared_copy(net), nn.CrossEntropyLoss(reduction="none")

    def orders(rows):
        return convergence.random_orders(len(rows), sizes.orders)

    @torch.no_grad()
    def forward(rows, size):
        return np.concatenate([criterion(twin(x[r]), y[r]).cpu().numpy() for r in rows.split(size)])

    def running(values, orders):
        steps = []
        for order in orders:
            mean = values[order[0]]
            for k, i in enumerate(order[1:], 2):
                before, mean = mean, mean + (values[i] - mean) / k
                steps.append(mean - before)
        return steps, None

    def anew(values, orders):
        means = [[values[order[:k]].mean() for k in range(1, len(order) + 1)] for order in orders]
        return np.diff(means), None

    def vectorised(rows):
        return convergence.loss_steps(
            curvature.per_sample_losses(net, x[rows], y[rows]), orders(rows)
        ), None

    methods = [
        Method("ours", vectorised, chunk=len(x)),
        Method(BASES["losses"][0], lambda rows: running(forward(rows, 1), orders(rows)), chunk=1),
        Method(
            "one pass, running means",
            lambda rows: running(forward(rows, len(rows)), orders(rows)),
            chunk=len(x),
        ),
        Method(
            BASES["losses"][1],
            lambda rows: anew(forward(rows, len(rows)), orders(rows)),
            chunk=len(x),
        ),
    ]
    ordered, k = (
        forward(torch.arange(len(x)), 1).astype(np.longdouble)[orders(x)],
        np.arange(1, len(x)),
    )
    truth = (ordered[:, 1:] - np.cumsum(ordered, 1)[:, :-1] / k) / (k + 1)
    return methods, torch.from_numpy(truth.astype(np.float64))


METHODS = {"norms": sample_norms, "norm": full_norm, "density": spectrum, "losses": loss_steps}

# --- measuring ------------------------------------------------------------------------------------


@contextmanager
def chunks_seen():
    """The chunk sizes [samples] that the memory budget of `Losses` gave meanwhile."""
    chosen, seen = curvature.Losses.chunk, []

    def spy(*arguments, **options):
        seen.append(chosen(*arguments, **options))
        return seen[-1]

    with patch.object(curvature.Losses, "chunk", spy):
        yield seen


def measure(task: str, model: str, net: ViT, sizes: Sizes) -> list[dict]:
    """The rows of a task on a model: every method against the task's base, "ours" against all of
    BASES.

    On a GPU without SciPy's eigsh, whose vectors live on the CPU, and without targets, which are of
    one CPU thread."""
    device = next(net.parameters()).device
    x, y = (t[: sizes.n if task in ("norms", "density") else sizes.k].to(device) for t in data())
    say(f"{task}, {model}: truth")
    methods, truth = METHODS[task](net, x, y, sizes)
    methods = [
        m for m in methods if m.call is not None and not (x.is_cuda and m.name.startswith("eigsh"))
    ]
    rows = torch.arange(len(x))
    torch.manual_seed(0)  # PyHessian starts from the global generator
    for method in methods:  # first calls import and compile: not timed
        method.call(rows[:1])
    for r in range(sizes.rounds):
        for method in methods:
            some = rows if method.share is None else rows.roll(-r * method.share)[: method.share]
            with chunks_seen() as seen:
                one_round(task, method, some)
            method.chunk = min([len(some), *([method.chunk] if method.chunk else seen)])
            say(
                f"{task}, {model}, round {r + 1}: {method.name}, {method.dtype}, "
                f"{method.ms[-1]:.4g} ms"
            )
    out = []
    for method in methods:
        for place, base in enumerate(BASES[task][: None if method.name == "ours" else 1]):
            other = next(m for m in methods if (m.name, m.dtype) == (base, method.dtype))
            ratios, goal = [b / a for a, b in zip(method.ms, other.ms)], math.nan
            if method is methods[0] and not x.is_cuda:
                goal = TARGETS.get((task, place, model), TARGETS.get((task, place, None), math.nan))
            row = common(task, model, net, sizes, method.dtype) | accuracy(
                method, truth.reshape(-1), task
            )
            row |= {
                "method": method.name,
                "base": base,
                "n": len(x),
                "chunk": method.chunk,
                "target": goal,
            }
            row |= {"ms_per_unit": np.median(method.ms), "ratio": np.median(ratios)}
            row |= {"ratio_low": min(ratios), "ratio_high": max(ratios)}
            row["reached"] = (
                "" if math.isnan(goal) else "reached" if row["ratio"] >= goal else "not reached"
            )
            out.append(row)
    return out


def one_round(task: str, method: Method, rows: Tensor) -> None:
    """Time one call and keep what it found."""
    gc.collect()  # PyHessian leaves cycles
    start = time.perf_counter()
    values, converged = method.call(rows)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    method.ms.append(1e3 * (time.perf_counter() - start) / (len(rows) if task == "norms" else 1))
    values = torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
    unsure = [math.nan] * len(values) if converged is None else [float(not c) for c in converged]
    method.found.update(
        zip(rows.tolist() if task == "norms" else range(len(values)), zip(values, unsure))
    )


def common(
    task: str, model: str, net: ViT, sizes: Sizes, dtype: torch.dtype = torch.float64
) -> dict:
    about = {
        "task": task,
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "unit": TASKS[task][1],
    }
    about |= {"parameters": sum(p.numel() for p in net.parameters()), "rounds": sizes.rounds}
    about["device"] = torch.cuda.get_device_name() if next(net.parameters()).is_cuda else "cpu"
    return about | {"torch": torch.__version__, "threads": torch.get_num_threads()}


def accuracy(method: Method, truth: Tensor, task: str) -> dict:
    """Relative errors of the values against the truth, over all samples that the method saw in some
    round."""
    values, unsure = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*method.found.values())
    )
    errors = (values / truth[list(method.found)] - 1).abs()
    within = math.nan if task == "density" else (errors <= 1e-3).double().mean().item()
    about = {"error_median": errors.median().item(), "error_worst": errors.max().item()}
    return about | {"within_1e-3": within, "not_converged": unsure.mean().item()}


def peak_mib() -> float:
    """Largest resident memory of this process so far [MiB]; Linux: getrusage would carry over that
    of the parent."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 1024
    )


def use_memory(model: str, n: int, quick: bool) -> None:
    """In a process of its own: the norms of n samples, the digits repeated."""
    net, (x, y) = network(model, quick), data()
    rows, two = torch.arange(n) % len(x), slice(2)
    curvature.per_sample_hessian_norms(net, x[two], y[two])
    before, start = peak_mib(), time.perf_counter()
    with chunks_seen() as seen:
        curvature.per_sample_hessian_norms(net, x[rows], y[rows])
    ms = 1e3 * (time.perf_counter() - start) / n
    print(
        json.dumps(
            {"before": before, "peak_mib": peak_mib(), "ms_per_unit": ms, "chunk": min(n, *seen)}
        )
    )


def memory(model: str, net: ViT, sizes: Sizes) -> list[dict]:
    """Peak memory of the per-sample norms for two numbers of samples; reached: it grows by less
    than 5 %."""
    out = []
    for n in sizes.memory:
        say(f"memory, {model}: {n} samples")
        command = [
            sys.executable,
            "-m",
            "workflow.benchmark.benchmark",
            "--memory-of",
            model,
            str(n),
            *["--quick"] * sizes.quick,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(
                f"The memory check of {n} samples stopped: "
                f"{done.stderr.strip().splitlines()[-1:] or 'killed'}."
            )
        found = json.loads(done.stdout.splitlines()[-1])
        found |= {"method": "ours", "base": f"{found['before']:.0f} MiB before", "n": n}
        out.append(common("memory", model, net, replace(sizes, rounds=1)) | found)
    out[-1]["ratio"] = out[-1]["peak_mib"] / out[0]["peak_mib"]
    out[-1]["reached"] = "reached" if out[-1]["ratio"] < 1.05 else "not reached"
    return out


# --- results --------------------------------------------------------------------------------------


def shown(row: dict) -> bool:
    """Whether the README shows a row: every method for the norms of one model, else ours and the
    base."""
    if row["task"] == "norms" and row["model"] == "small-trained":
        return row["base"] == BASES["norms"][0]
    if row["task"] != "norms" and row["model"] == "small-40-step":
        return False
    return row["dtype"] == "float64" and row["method"] in ("ours", BASES[row["task"]][0])


def table(frame: pd.DataFrame) -> str:
    """The rows that the README shows as Markdown, a table a device, the CPU's first; the CSV has
    them all."""
    groups = frame.groupby("device", sort=False)
    return "\n\n".join(
        table_of(groups.get_group(d)) for d in sorted(groups.groups, key=lambda d: (d != "cpu", d))
    )


def table_of(frame: pd.DataFrame) -> str:
    """The rows of one device, with what they have in common below."""

    def pair(row, names, form):
        return " / ".join(form.format(row[name]) for name in names if not pd.isna(row[name]))

    lines = [
        "task | model | method | ms per unit | times faster than the base | error, median / worst"
    ]
    lines = [f"{lines[0]} | within 1e-3 / not converged | target", " | ".join(["---"] * 8)]
    for row in filter(shown, frame[frame["task"] != "memory"].to_dict("records")):
        ratio = "1 (base)"
        if row["method"] != row["base"]:
            ratio = f"{row['ratio']:.3g} ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})"
        if row["base"] != BASES[row["task"]][0]:
            ratio += f" over {row['base']}"
        cells = [TASKS[row["task"]][0].format(row["n"]), row["model"].replace("-", " ", 1)]
        cells += [
            row["method"] + ", float32" * (row["dtype"] == "float32"),
            f"{row['ms_per_unit']:.3g}",
            ratio,
        ]
        cells += [pair(row, ("error_median", "error_worst"), "{:.0e}")]
        cells += [pair(row, ("within_1e-3", "not_converged"), "{:.0%}")]
        lines.append(
            " | ".join(
                [*cells, "" if pd.isna(row["target"]) else f"x{row['target']:g}: {row['reached']}"]
            )
        )
    text = "\n".join(f"| {line} |" for line in lines) + "\n"
    for model, group in frame[frame["task"] == "memory"].groupby("model", sort=False):
        peaks = ", ".join(
            f"{r.peak_mib:.0f} MiB for {r.n} samples ({r.base})" for r in group.itertuples()
        )
        grows = "it does not grow" if group["reached"].iloc[-1] == "reached" else "it grows"
        budget = f"at the default budget of {curvature.MEMORY / 2**30:g} GiB"
        text += f"\nPeak memory of the per-sample norms, {model}, {budget}: {peaks}; {grows}.\n"
    about = (
        f"{name} {', '.join(map(str, frame[name].unique()))}"
        for name in ("device", "torch", "threads", "rounds")
    )
    note = "float64 unless said otherwise; ratios: median and range over the rounds."
    return f"{text}\n{'; '.join(about)}; {note}"


def merge(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """With the rows of an earlier run, where this one did not take the same task on the same model
    and device."""
    if path.is_file():
        key, old = ["task", "model", "device"], pd.read_csv(path)
        new = set(frame[key].itertuples(index=False, name=None))
        frame = pd.concat(
            [old[[row not in new for row in old[key].itertuples(index=False, name=None)]], frame]
        )
    order = {name: place for place, name in enumerate([*TASKS, *MODELS])}
    return frame.sort_values(
        ["task", "model"], key=lambda c: c.map(order), kind="stable", ignore_index=True
    )


def write(frame: pd.DataFrame, path: Path, page: Path) -> None:
    """The CSV, and the table between the markers `benchmark` of the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    fill(page, "benchmark", table(frame))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Sizes]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one round: does everything still run?"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="memory takes the last model"
    )
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: all tasks but memory"
    )
    parser.add_argument(
        "--n", type=int, help="samples of norms and density (256); norm and losses take 4n"
    )
    parser.add_argument(
        "--write", action="store_true", help=f"update {PAGE.name} and {CSV.relative_to(ROOT)}"
    )
    parser.add_argument("--csv", type=Path, default=CSV, help=argparse.SUPPRESS)
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    for name, value, most in (
        ("n", options.n, len(data()[0]) // 4),
        ("rounds", options.rounds, 1000),
    ):
        if value is not None:
            if not 1 <= value <= most:
                parser.error(f"{name} is {value}: give 1 to {most}.")
            sizes = replace(sizes, **{name: value} | ({"k": 4 * value} if name == "n" else {}))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and PyTorch sees no GPU here: give cpu.")
    if options.write:
        if options.quick and options.csv == CSV:
            parser.error("--quick measures too little to be published: leave --write out.")
        if any(options.page.read_text(encoding="utf-8").count(marker) != 1 for marker in MARKERS):
            parser.error(
                f"{options.page.name} needs {MARKERS[0]} and {MARKERS[1]} once each: "
                "add the two lines."
            )
    return options, sizes


def main(arguments: list[str] | None = None) -> int:
    options, sizes = parse(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message="Using backward.. with create_graph=True"
    )  # PyHessian does
    if options.memory_of:
        use_memory(options.memory_of[0], int(options.memory_of[1]), options.quick)
        return 0
    found, earlier = [], options.csv if options.write else Path(os.devnull)
    for model in options.models:
        net = network(model, sizes.quick).to(options.device)
        for task in options.tasks:
            if task != "memory":
                found += measure(task, model, net, sizes)
            elif model == options.models[-1] and options.device == "cpu":
                found += memory(model, net, sizes)
            frame = merge(pd.DataFrame(found).reindex(columns=COLUMNS), earlier)
            if options.write:
                write(
                    frame, options.csv, options.page
                )  # after every task: what is measured is kept
    print(table(frame))
    return 0


if __name__ == "__main__":
    sys.exit(main())
