"""Speed and accuracy beside other software, on real digits: `python -m workflow.benchmark`.

One process, one thread, on the CPU or a GPU. The methods take turns (A B C A B C ...), and a ratio
compares two methods in the same round, so that a machine that slows down in between does not move
it. Slow methods get a block of the samples, another one in every round. README.md in this folder
says what is compared, with which settings, and what every column means.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from workflow.benchmark.measuring import measure, memory, use_memory
from workflow.benchmark.settings import (
    COLUMNS,
    CSV,
    MARKERS,
    MODELS,
    PAGE,
    QUICK,
    ROOT,
    TASKS,
    Sizes,
    data,
    network,
)
from workflow.benchmark.tables import merge, table, write


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
