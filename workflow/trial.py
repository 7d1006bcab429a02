"""How batches are tried: on a copy of the tree, with tiny parameters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from utils.run.layout import RUNS
from utils.run.parameters import MODELS
from utils.run.tables import read_table
from workflow.execution import NAMES

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "dataset": "digits",
    "n_samples": 300,
    "epochs": 2,
    "polish_steps": 2,
    "d_model": 8,
    "n_heads": 2,
    "depth": 1,
    "d_ff": 12,
    "patch_size": 4,
    "n_per_sample": 12,
    "n_certified": 4,
    "n_pyhessian": 2,
    "n_pool": 40,
    "sizes": [10, 20],
    "n_repeats": 2,
    "n_blocks": 4,
    "probes": 6,
    "steps": 5,
    "n_bounds": 6,
    "n_dense": 1,
    "n_orders": 100,
    "n_steps": 2,
    "radii": [1e-4, 1e-2],
    "batch": 4,
    "n_ascent": 2,
    "n_eigenvectors": 3,
    "n_weights": 3,
    "n_signs": 3,
    "retrain_sizes": [10, 20, 40],
    "n_inits": 2,
    "plane_points": 3,
    "tolerances": [0.2, 0.5],
    "seed": 1,
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "RUN_LOCK_WAIT": "30"}
ENVIRONMENT.pop("DATA_ROOT", None)


def tree(folder: Path) -> Path:
    """A copy of what git would check out, without results: notebooks find their root from where
    they run."""
    for name in ("utils", "notebooks", "studies", "workflow"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "rendered")
        )
    (folder / "data").mkdir()
    for name in ("registry.json", "published.csv", "columns.yaml"):
        shutil.copy(ROOT / "data" / name, folder / "data")
    return folder


def execute(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command run in the folder, with one thread and without the data sets of this machine."""
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )


def snakemake(folder: Path, study: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The study of that name run by Snakemake."""
    command = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--nolock", *options]
    return execute(folder, *command, "--config", f"study=studies/{study}.yaml")


def papermill(folder: Path, stage: str, **parameters: Any) -> subprocess.CompletedProcess[str]:
    """A notebook executed with those of the parameters that it has."""
    fields = MODELS[stage].model_fields
    values = {name: value for name, value in parameters.items() if name in fields}
    return execute(folder, sys.executable, "-m", "papermill", f"notebooks/{NAMES[stage]}.ipynb",
                   str(folder / f"out_{stage}.ipynb"), "-y", yaml.safe_dump(values), "--cwd", ".",
                   "--no-progress-bar")  # fmt: skip


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a command printed on standard error, where its sentence stands."""
    return [
        line for line in done.stderr.splitlines() if line.strip() and "[IPKernelApp]" not in line
    ][-1]


def table(folder: Path, file: str, run: str = "tiny") -> pd.DataFrame:
    """A result table of a run."""
    return read_table(folder / RUNS / run / file)
