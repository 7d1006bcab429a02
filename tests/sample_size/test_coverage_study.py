"""The study of coverage, `make coverage`, in small."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ten_pilots_of_the_study(tmp_path):
    """Ten pilots a cell, data that need no download: truths as committed, promises kept."""
    script = [
        sys.executable,
        "-m",
        "workflow.experiments.coverage",
        "--pilots",
        "10",
        "--parts",
        "fixed",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        script, cwd=ROOT, env=os.environ | {"DATA_ROOT": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, committed = (
        pd.read_csv(f / "fixed.csv") for f in (tmp_path, ROOT / "data/results/coverage")
    )
    cells = ["dataset", "model", "radius", "tolerance", "pilot"]
    both = found[found["rule"] == "interval"].merge(
        committed[committed["rule"] == "interval"], on=cells
    )
    assert len(both) == 24 and (both["covered_x"] >= 0.8).all()
    assert np.allclose(both["truth_x"], both["truth_y"], rtol=0.1)
    assert (
        both["ratio_median_x"].between(both["ratio_median_y"] / 2, both["ratio_median_y"] * 2).all()
    )
    control = found[found["rule"] == "one step"]
    assert (control["covered"] == 0).all()  # the rule of the papers never reaches the truth
