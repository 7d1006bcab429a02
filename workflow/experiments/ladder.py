"""The ladder of bounds on the trained networks of studies/digits_ladder.yaml: `make ladder`.

Takes every run of the study whose weights are there, 16 training and 16 held-out examples each,
certifies their Hessian norms and asks every rung. Writes data/results/digits_ladder/ladder.csv, one
row for a run, a part and a rung: the ratios bound / certified lower end of the norm and the cost,
the matrix operations for the first training example over those of one Hessian-vector product. Exits
with 1 if a bound lies below the lower end of a norm. The rung tangents takes fewer examples
on the larger networks, where one takes up to minutes: see `examples`. All of it takes hours
of one core; `--runs` and `--rungs` share it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from utils.bounds import RUNGS as RUNGS_OF_BOUNDS
from utils.bounds import hessian_bounds, measured_norms
from utils.bounds.compare import bound_and_cost
from utils.data import Dataset
from utils.hessian import Losses, per_sample_hessian_norms
from utils.hessian.losses import SampleHessians
from utils.hessian.operations import operations
from utils.networks import restore
from utils.run.files import atomic
from utils.run.layout import RESULTS, RUNS
from utils.run.study import read_study

STUDY = "digits_ladder"
MEASURED = "prior, measured"  # the prior with constants of the whole part
RUNGS = ("closed_form", "prior", MEASURED, *RUNGS_OF_BOUNDS[2:])


def examples(rung: str, depth: int, width: int, most: int) -> int:
    """How many examples of a part a rung is asked for."""
    size = depth * (width / 16) ** 3  # of its dense matrix products
    if rung == "tangents" and size > 2:
        return 0 if size > 48 else min(most, 4)
    return most


def of_run(folder: Path, run: str, most: int, rungs: list[str]) -> list[dict]:
    description = json.loads((folder / "model.json").read_text())
    with np.load(folder / "dataset.npz") as arrays:
        dataset = Dataset.from_arrays(
            dict(arrays), json.loads((folder / "dataset.json").read_text())
        )
    network = restore(description, load_file(folder / "model.safetensors"), dataset.info).double()
    c, rows, costs = network.config, [], {}
    for part, x, y in (
        ("training", dataset.x_train, dataset.y_train),
        ("held-out", dataset.x_test, dataset.y_test),
    ):
        x, y = x[:most], y[:most]
        norms = per_sample_hessian_norms(network, x, y, description["loss"], certify=True)
        losses = Losses(network, x, y, description["loss"])
        product, v = (
            SampleHessians(losses, torch.arange(len(x))),
            torch.randn(len(x), losses.P).double(),
        )
        unit = operations(product, v)[1] / len(x)  # of one product of one sample
        measured = measured_norms(
            network, dataset.x_train if part == "training" else dataset.x_test
        )
        for name in rungs:
            n = examples(name, c.depth, c.d_model, most)
            rung = "prior" if name == MEASURED else name
            options = {"measured": measured} if name == MEASURED else {}
            if n == 0 or (rung == "closed_form" and c.norm != "pre"):
                continue
            ask = hessian_bounds
            if name not in costs:  # on one sample: counting takes several times as long as asking
                one = network, x[:1], y[:1], description["loss"], rung
                costs[name] = bound_and_cost(*one, **options)[1] / unit
            found = ask(network, x[:n], y[:n], description["loss"], rung, **options).values
            ratio = found / norms.lower[:n]
            rows.append(
                {
                    "run": run,
                    "depth": c.depth,
                    "width": c.d_model,
                    "seed": int(run.split("_")[-1]),
                    "part": part,
                    "rung": name,
                    "samples": n,
                    "ratio_min": ratio.min().item(),
                    "ratio_median": ratio.median().item(),
                    "ratio_max": ratio.max().item(),
                    "log10_bound": found.log10().median().item(),
                    "log10_norm": norms.lower[:n].log10().median().item(),
                    "certificate_max": (norms.upper / norms.lower).max().item(),
                    "products": costs[name],
                    "violations": int((ratio < 1 - 1e-9).sum()),
                }
            )
    return rows


def order(column: pd.Series) -> pd.Series:
    return column.map(RUNGS.index) if column.name == "rung" else column


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--runs", nargs="*", help="some runs of the study alone")
    parser.add_argument("--rungs", nargs="*", default=RUNGS, choices=RUNGS, help="some rungs alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / STUDY / "ladder.csv"
    table = pd.DataFrame(columns=["run", "rung", "violations"])
    study = read_study(f"studies/{STUDY}.yaml")
    for run in options.runs or study.runs:
        folder = RUNS / run
        if not (folder / "model.safetensors").is_file():
            print(
                f"{run}: no weights yet: run notebooks 01 and 02 of the study first.",
                file=sys.stderr,
            )
            continue
        found = pd.DataFrame(of_run(folder, run, options.samples, options.rungs))
        table = (
            pd.read_csv(path) if path.is_file() else table
        )  # runs may be shared out among processes
        old = table[(table["run"] != run) | ~table["rung"].isin(options.rungs)]
        table = pd.concat([old, found], ignore_index=True)
        table = table.sort_values(
            ["depth", "width", "seed", "part", "rung"], key=order, kind="stable"
        )
        with atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        print(
            found[["run", "part", "rung", "ratio_median", "ratio_max", "products"]].to_string(
                index=False
            ),
            flush=True,
        )
    return int(table["violations"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main())
