"""How a notebook starts its work on a run."""

from __future__ import annotations

import os

from utils.run import locks
from utils.run.files import writable
from utils.run.layout import RUNS
from utils.run.parameters import Parameters, StudyReport
from utils.run.report_stage import ReportStage
from utils.run.stage import Stage


def begin(stage: str, p: Parameters, wait_s: float | None = None, dtype: str = "float64") -> Stage:
    """Start notebook `stage` ("01" to "07") on the run `p.run` (07: on the runs `p.runs`): check
    that its inputs are there and not stale, and take its lock.

    p       the notebook's parameters
    wait_s  how long to wait for another process [s] (default: RUN_LOCK_WAIT of the environment,
            else 2)
    dtype   precision of the numbers, for the record

    Raises FileNotFoundError where an earlier notebook has not run, ValueError where an input has
    changed since or the device is not there, RuntimeError where another process keeps the lock;
    each with one sentence.

    >>> import contextlib, tempfile
    >>> from utils.run.parameters import DataPreparation
    >>> from utils.run.record import record_of
    >>> p = DataPreparation.model_construct(run="try", seed=0)
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    ...     stage = begin("01", p)
    ...     stage.write_json("dataset.npz", "arrays, as a rule")
    ...     stage.write_json("dataset.json", {"name": "example"})
    ...     stage.finish()
    ...     sorted(record_of("try")["01"]["outputs"])
    ['dataset.json', 'dataset.npz']
    """
    if isinstance(p, StudyReport):
        begun: Stage = ReportStage(p, dtype)
    else:
        begun = Stage(stage, p, getattr(p, "run", ""), dtype)
    _check_device(begun.device)
    if stage not in ("01", "07") and not begun.folder.is_dir():
        raise FileNotFoundError(
            f"run {begun.run!r} does not exist in {RUNS}/: run notebook 01 first."
        )
    if wait_s is None:
        wait_s = float(os.environ.get("RUN_LOCK_WAIT", "2"))
    with writable(f"run {begun.run!r}"):
        begun.folder.mkdir(parents=True, exist_ok=True)
        taken = locks.acquire(begun.folder, stage, wait_s)
    if not taken:
        raise RuntimeError(
            f"run {begun.run!r} is in use by another process: wait for it or stop it."
        )
    try:
        begun.open()
    except BaseException:
        locks.release(begun.folder)
        raise
    return begun


def _check_device(device: str) -> None:
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                f"parameter device is {device!r} and PyTorch sees no GPU here: give cpu."
            )
