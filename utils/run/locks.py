"""Who may work on a run: one lock file for each stage at work, one that all of them take turns at.

A stage holds its own lock from `begin` to `finish`. It may start while no stage is at work that
writes what it reads, or reads what it writes; whether it may is decided under the run's lock, so
that no two decide at once. The kernel gives the locks of a killed process back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.run.layout import READERS, SOURCES

held: dict[Path, FileLock] = {}  # by the run's folder: the stage of it that this process works on


def _lock(path: Path) -> FileLock:
    # A soft lock, which filelock falls back to, would outlive a killed process.
    return FileLock(path, thread_local=False, fallback_to_soft=False, mode=0o644)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """The run's own lock, for a moment: to decide who may start, or to write run.json.

    folder  the run's folder, which exists
    """
    with _lock(folder / ".lock"):
        yield


def acquire(folder: Path, stage: str, wait_s: float) -> bool:
    """Take the lock of a stage, waiting at most `wait_s` seconds; whether that succeeded.

    A lock that this process holds in the folder is given back first: a notebook that is run again
    in its kernel does not lock itself out.

    folder  the run's folder, which exists
    stage   "01" to "07"
    """
    release(folder)
    start = time.monotonic()
    while not _taken(folder, stage):
        if time.monotonic() - start >= wait_s:
            return False
        time.sleep(0.1)
    return True


def _taken(folder: Path, stage: str) -> bool:
    with turn(folder):
        neighbours = SOURCES[stage] + READERS[stage]
        if any(_at_work(folder, neighbour) for neighbour in neighbours):
            return False
        lock = _lock(folder / f".lock.{stage}")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        held[folder.resolve()] = lock
        return True


def _at_work(folder: Path, stage: str) -> bool:
    try:
        with _lock(folder / f".lock.{stage}").acquire(blocking=False):
            return False
    except Timeout:
        return True


def release(folder: Path) -> None:
    """Give back the lock that this process holds in a run's folder, if any."""
    lock = held.pop(folder.resolve(), None)
    if lock is not None:
        lock.release()
