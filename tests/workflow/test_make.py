"""What is given to make never becomes a command."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """make in a folder whose installation is up to date; a command that runs leaves a file."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("requirements.txt", "constraints.txt"):
        (folder / name).touch()
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "snakemake"):
        (programs / name).write_text('#!/bin/sh\necho "$@"\n')
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    # The tests may themselves run under make, which tells its children so.
    ours = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=ours, capture_output=True, text=True
    )


@pytest.mark.parametrize("variable", ["NAME", "STUDY", "CORES", "GPUS"])
@pytest.mark.parametrize(
    "value",
    ["x; touch ran", "$(shell touch ran)", "`touch ran`", "x#; touch ran", "x y", "x'", "a,b)"],
)
def test_hostile_names_run_nothing(tmp_path, variable, value):
    given = [f"{variable}={value}"] + ["NAME=vit_mnist"] * (variable != "NAME")
    done = make(tmp_path, "study", *given)
    assert done.returncode == 2 and f"{variable} is not a plain " in done.stderr
    assert not done.stdout and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("variable", ["CORES", "GPUS"])
@pytest.mark.parametrize("value", ["0", "00", "", "-1", "two", "1.5"])
def test_no_core_and_no_gpu_are_refused(tmp_path, variable, value):
    """Snakemake would wait for ever, or say something of its own."""
    done = make(tmp_path, "study", "NAME=vit_mnist", f"{variable}={value}")
    assert done.returncode == 2 and "from 1 on" in done.stderr and not done.stdout


@pytest.mark.parametrize("given", ["NAME=vit_mnist-2.0", "STUDY=studies/vit_mnist-2.0.yaml"])
def test_a_study_runs_by_name_and_by_path(tmp_path, given):
    done = make(tmp_path, "study", given)
    assert done.returncode == 0 and not done.stderr
    first, last = done.stdout.splitlines()
    assert first.endswith("--config study=studies/vit_mnist-2.0.yaml")
    assert last == "-m workflow summary studies/vit_mnist-2.0.yaml"
