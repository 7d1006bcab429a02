"""How the tests make little stages of a run, in this process and in others."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from utils.run.layout import WRITES
from utils.run.parameters import MODELS, Parameters, StudyReport
from utils.run.stage import Stage
from utils.run.start import begin
from utils.run.tables import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = {"int": 3, "float": 0.1, "str": "x", "bool": True}


def p(stage: str, run: str = "a", **values) -> Parameters:
    """Parameters of a notebook without their validation: here only the names matter."""
    if stage == "07":
        return StudyReport(study="s", runs=[run])
    return MODELS[stage].model_construct(run=run, seed=1, **values)


def frame(file: str) -> pd.DataFrame:
    """A table of one row."""
    return pd.DataFrame({c: [EXAMPLE[dtype]] for c, (dtype, _) in SCHEMAS[file].items()})


def make(stage: str, value: float = 1.0, run: str = "a") -> Stage:
    """Run a stage that writes little tables, arrays and weights."""
    begun = begin(stage, p(stage, run))
    for file in WRITES[stage]:
        if file.endswith(".npz"):
            begun.write_npz(file, x=np.array([value]))
        elif file.endswith(".json"):
            begun.write_json(file, {"value": value})
        elif file.endswith(".safetensors"):
            import torch  # not by the programs that need it for nothing

            begun.write_safetensors(file, {"w": torch.tensor([value])})
        else:
            begun.write_csv(file, frame(file))
    begun.finish()
    return begun


def in_another_process(program: str) -> subprocess.Popen:
    """A Python program that can import utils and the tests' helpers, with pipes to it."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)
