"""Where everything lies below the project's root, and which notebook writes what."""

from __future__ import annotations

from pathlib import Path

RUNS = Path("data/runs")
RESULTS = Path("data/results")
FIGURES = Path("figures")

DATA = ["dataset.npz", "dataset.json"]
MODEL = ["model.safetensors", "model.json"]

# Of each notebook the files it needs. It may read other files of those that made them, too.
NEEDS: dict[str, list[str]] = {
    "01": [],
    "02": DATA,
    "03": DATA + MODEL,
    "04": [*DATA, *MODEL, "per_sample_norms.csv"],
    "05": [*DATA, *MODEL, "per_sample_norms.csv", "hessian_norms.csv"],
    "06": DATA + MODEL,
    "07": [],  # reads every table of every run of its study, and pools those it uses
}
WRITES: dict[str, list[str]] = {
    "01": DATA,
    "02": [*MODEL, "training.csv"],
    "03": [
        "per_sample_norms.csv",
        "hessian_norms.csv",
        "trace.csv",
        "blocks.csv",
        "spectrum.csv",
        "estimators.csv",
    ],
    "04": ["bounds.csv"],
    "05": ["convergence.csv", "verdicts.csv"],
    "06": ["sample_size.csv"],
    "07": ["findings.csv", "runs.csv"],
}
PRODUCER = {file: stage for stage, files in WRITES.items() for file in files}
SOURCES = {stage: sorted({PRODUCER[file] for file in needs}) for stage, needs in NEEDS.items()}
READERS = {stage: [s for s, read in SOURCES.items() if stage in read] for stage in SOURCES}

# the ladder of bounds, from the loosest rung to the sharpest, as parameters and tables name them
RUNGS = ("closed_form", "prior", "activations", "tangents", "majorant")
