"""Methods take turns; times, errors and memory become rows."""

from __future__ import annotations

import gc
import json
import math
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from utils.hessian import Losses, per_sample_hessian_norms
from utils.networks import ViT
from workflow.benchmark.methods import METHODS
from workflow.benchmark.settings import BASES, TARGETS, TASKS, Method, Sizes, data, network, say


@contextmanager
def chunks_seen():
    """The chunk sizes [samples] that the memory budget of `Losses` gave meanwhile."""
    chosen, seen = Losses.chunk, []

    def spy(*arguments, **options):
        seen.append(chosen(*arguments, **options))
        return seen[-1]

    with patch.object(Losses, "chunk", spy):
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
    per_sample_hessian_norms(net, x[two], y[two])
    before, start = peak_mib(), time.perf_counter()
    with chunks_seen() as seen:
        per_sample_hessian_norms(net, x[rows], y[rows])
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
            "workflow.benchmark",
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
