"""Do studies survive? `make check-batches`: kills, failures, full disks, two at once, many runs.

Each part works on a copy of the tree with a study of tiny runs and says what it saw; the script
exits with 1 if a promise was broken. `kill` and `together` compare all result files with those of
an undisturbed study byte for byte, but for the times in run.json and the stamps inside figures; of
executed notebooks their names, and that they are whole. A kill counts while notebooks are missing;
a study that ended before is compared and begun anew. About fifteen minutes on two cores, `many`
(200 runs through notebooks 01 and 02) another twenty. `slurm` sends a study through a Slurm of one
node and compares likewise, only when asked for by name, as root, with requirements-slurm.txt
installed (ten minutes):

    workflow/slurm/start.sh && .venv/bin/python -m workflow.experiments.batches --parts slurm
    workflow/slurm/stop.sh
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import yaml

from workflow.trial import ENVIRONMENT, ROOT, TINY, tree

PARTS = ("kill", "failure", "disk", "together", "many", "slurm")
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
SMALL = TINY | {
    "n_samples": 200,
    "n_weights": 2,
    "plane_points": 2,
    "retrain_sizes": [],
    "radii": [1e-2],
}


def study(folder: Path, runs: dict[str, dict]) -> Path:
    path = folder / "studies" / "batch.yaml"
    entries = [{"run": run, "parameters": SMALL | values} for run, values in runs.items()]
    path.write_text(yaml.safe_dump({"name": "batch", "runs": entries}))
    return folder


def command(cores: int, *options: str) -> list[str]:
    shared = ["--nolock", "--rerun-incomplete", "--keep-going", "--quiet", "all"]
    snakemake = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        "workflow/Snakefile",
        "--cores",
        str(cores),
        *shared,
        *options,
    ]
    return [*snakemake, "--config", "study=studies/batch.yaml"]


def snakemake(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(2, *options), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )


def results(folder: Path) -> dict[str, bytes]:
    """Every file of data and figures, hidden ones too, without what differs between two equal
    runs."""
    found = {}
    for path in sorted([*(folder / "data").rglob("*"), *(folder / "figures").rglob("*")]):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.startswith(".lock"):
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".ipynb" and path.is_relative_to(folder / "data"):
            cells = [c for c in json.loads(found[name])["cells"] if c["cell_type"] == "code"]
            found[name] = b"whole" if all(c["execution_count"] for c in cells) else b"half"
        if path.name == "run.json":
            record = json.loads(found[name])
            for entry in record["stages"].values():
                entry.pop("wall_time_s")
            found[name] = json.dumps(record).encode()
        elif path.suffix == ".pdf":
            found[name] = re.sub(rb"/(CreationDate|ID).*", b"", found[name])
    return found


def differences(a: dict, b: dict) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def kill(where: Path, times: int) -> bool:
    """A study killed with SIGKILL, children and all, at random moments, and resumed."""
    runs = {"one": {}, "two": {"seed": 2}}
    calm, hunted = study(tree(where / "calm"), runs), study(tree(where / "hunted"), runs)
    begun = time.monotonic()
    assert snakemake(calm).returncode == 0
    whole, moments, undisturbed = time.monotonic() - begun, random.Random(0), results(calm)
    kills, ended = 0, 0
    while kills < times:
        process = subprocess.Popen(
            command(2), cwd=hunted, env=ENVIRONMENT, start_new_session=True, **SILENT
        )
        time.sleep(moments.uniform(0.5, max(4.0, 0.4 * whole)))
        missing = 6 * len(runs) + 1 - len(list((hunted / "data" / "runs").rglob("*.done")))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        orphans(hunted)
        half = [
            f
            for f in (hunted / "data" / "runs").rglob("*.csv")
            if not f.read_bytes().endswith(b"\n")
        ]
        if half:
            print(f"kill: half-written: {half}")
            return False
        kills, ended = kills + bool(missing), ended + (not missing)
        if not missing:  # it had ended: all is there, and it begins anew
            if different := differences(undisturbed, results(hunted)):
                print(f"kill: after {kills} kills different: {different}")
                return False
            for folder in ("data/runs", "data/results/batch", "figures/batch"):
                shutil.rmtree(hunted / folder)
    last = snakemake(hunted)
    different = differences(undisturbed, results(hunted))
    print(
        f"kill: {kills} kills within {0.4 * whole:.0f} s each (undisturbed: {whole:.0f} s), the "
        f"study ended {ended} times between them; end {last.returncode}; {len(undisturbed)} files, "
        f"different: {different or 'none'}",
        flush=True,
    )
    return last.returncode == 0 and not different


def orphans(folder: Path) -> None:
    """Waits up to 20 s for kernels that outlived their papermill, which notice by themselves."""
    for _ in range(100):
        at_work = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):  # a process that has just ended
                at_work += [link] if os.readlink(link) == str(folder.resolve()) else []
        if not at_work:
            return
        time.sleep(0.2)


def failure(where: Path) -> bool:
    """A run trained before, and then told to train in a way that fails: its notebook stays with the
    traceback, its old files stay, it fails again when started again, and the other two runs end."""
    folder = tree(where / "failure")
    study(folder, {"bad": {}})
    assert snakemake(folder, "--until", "notebook_02").returncode == 0
    old = (folder / "data/runs/bad/model.safetensors").read_bytes()
    study(folder, {"good": {}, "bad": {"learning_rate": 1e12, "epochs": 3}, "fine": {"seed": 3}})
    done, again = (
        snakemake(folder),
        snakemake(folder),
    )  # the old model stays, and never passes for the new one
    kept = (folder / "data/runs/bad/model.safetensors").read_bytes() == old
    notebook = folder / "data/runs/bad/notebooks/02_model_training.ipynb"
    traceback = notebook.is_file() and "Traceback" in notebook.read_text()
    ended = [(folder / f"data/runs/{run}/sample_size.csv").is_file() for run in ("good", "fine")]
    print(
        f"failure: exit {done.returncode}, and again {again.returncode}, traceback kept: "
        f"{traceback}, others ended: {ended}, what was there before kept: {kept}",
        flush=True,
    )
    print(
        "  " + "\n  ".join(line for line in done.stderr.splitlines() if line.startswith("bad")),
        flush=True,
    )
    return done.returncode != 0 and again.returncode != 0 and traceback and all(ended) and kept


def disk(where: Path) -> bool:
    """A file system that fills, then one that is read-only: one sentence, nothing lost. Needs the
    right to mount."""
    folder = study(tree(where / "disk"), {"one": {}})
    assert snakemake(folder, "--until", "notebook_01").returncode == 0
    kept, runs = where / "kept", folder / "data" / "runs"
    shutil.copytree(runs, kept)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", runs], capture_output=True
    )
    if mounted.returncode:
        print("disk: not shown: no right to mount a small file system; run it as root.", flush=True)
        return False
    try:
        shutil.copytree(kept, runs, dirs_exist_ok=True)
        study(folder, {"one": {"n_samples": 1500}})
        full = snakemake(folder, "--until", "notebook_01")
        same = all(
            (runs / "one" / f).read_bytes() == (kept / "one" / f).read_bytes()
            for f in ("dataset.npz", "run.json")
        )
        subprocess.run(["mount", "-o", "remount,ro", runs], check=True)
        begin = (
            "from utils.run import begin; from utils.run.parameters import DataPreparation as P; "
        )
        begin += "begin('01', P.model_construct(run='one'))"
        python = [sys.executable, "-c", begin]
        readonly = subprocess.run(
            python, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
        )
    finally:
        subprocess.run(["umount", runs], check=True)
    said = [
        re.search(r".*(cannot be written|[Nn]o space left|[Rr]ead-only).*", done.stderr)
        for done in (full, readonly)
    ]
    print(
        f"disk: full: exit {full.returncode}, {said[0] and said[0][0].strip()}; "
        f"files as they were: {same}"
    )
    print(
        f"disk: read-only: exit {readonly.returncode}, {said[1] and said[1][0].strip()}", flush=True
    )
    return full.returncode != 0 and readonly.returncode != 0 and same and all(said)


def together(where: Path) -> bool:
    """Two Snakemakes on one folder at once: both end, or one refuses, and the files are those of
    one alone."""
    runs = {"one": {}, "two": {"seed": 2}}
    alone, shared = study(tree(where / "alone"), runs), study(tree(where / "shared"), runs)
    assert snakemake(alone).returncode == 0
    patient = ENVIRONMENT | {"RUN_LOCK_WAIT": "300"}
    both = [subprocess.Popen(command(1), cwd=shared, env=patient, **SILENT) for _ in range(2)]
    codes = [process.wait() for process in both]
    resumed = snakemake(shared)
    different = differences(results(alone), results(shared))
    print(
        f"together: exits {codes}, a third afterwards {resumed.returncode}; "
        f"different: {different or 'none'}",
        flush=True,
    )
    return resumed.returncode == 0 and not different


def many(where: Path, count: int) -> bool:
    folder = study(tree(where / "many"), {f"r{i}": {"seed": i, "epochs": 1} for i in range(count)})
    begun = time.monotonic()
    done = snakemake(folder, "--until", "notebook_02")
    ended = sum((folder / f"data/runs/r{i}/model.safetensors").is_file() for i in range(count))
    print(
        f"many: exit {done.returncode}, {ended} of {count} runs trained in "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )
    return done.returncode == 0 and ended == count


def slurm(where: Path) -> bool:
    """A study through the Slurm of tests/slurm/start.sh, as the README says, and here: the same
    files."""
    if not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True).returncode:
        print("slurm: no Slurm answers: run workflow/slurm/start.sh as root.", flush=True)
        return False
    runs = {"one": {}, "two": {"seed": 2}}
    local, sent = study(tree(where / "local"), runs), study(tree(where / "sent"), runs)
    begun = time.monotonic()
    assert snakemake(local).returncode == 0
    middle = time.monotonic()
    profile = [
        "--profile",
        str(ROOT / "workflow" / "profiles" / "slurm"),
        "--slurm-init-seconds-before-status-checks",
        "5",
    ]
    through = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", *profile]
    through += ["--config", "study=studies/batch.yaml"]
    done = subprocess.run(through, cwd=sent, env=ENVIRONMENT, capture_output=True, text=True)
    ended = time.monotonic()
    if done.returncode:
        print("  " + "\n  ".join(done.stderr.splitlines()[-10:]))
    queue = [
        "squeue",
        "--states=all",
        "--noheader",
        "--format=%T %Z",
    ]  # state and folder of each job
    jobs = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.splitlines()
    states = dict(Counter(line.split()[0] for line in jobs if line.endswith(f" {sent}")))
    different = differences(results(local), results(sent))
    print(
        f"slurm: exit {done.returncode}, jobs {states}, {ended - middle:.0f} s "
        f"(local: {middle - begun:.0f} s); {len(results(local))} files, "
        f"different: {different or 'none'}",
        flush=True,
    )
    return done.returncode == 0 and states == {"COMPLETED": 6 * len(runs) + 1} and not different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=PARTS[:-2], choices=PARTS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=200, help="of the part many")
    arguments, kept = parser.parse_args(), True
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            for name in (
                "calm",
                "hunted",
                "failure",
                "disk",
                "alone",
                "shared",
                "many",
                "local",
                "sent",
            ):
                (Path(folder) / name).mkdir()
            more = {"kill": [arguments.kills], "many": [arguments.runs]}.get(part, [])
            kept &= globals()[part](Path(folder), *more)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
