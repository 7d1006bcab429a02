"""One notebook at work on one run: made by `begin`, ended by `finish`.

`begin` locks the stage (`utils.run.locks`) and refuses a missing or stale input. Results go to
temporary names and `finish` renames them all, so a stage that fails leaves everything as it was.
`run.json` says, per stage, with what parameters, versions and inputs its files were made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.run import locks
from utils.run.files import as_json, atomic, sha256, writable
from utils.run.layout import NEEDS, PRODUCER, RUNS, SOURCES, WRITES
from utils.run.named import named_files
from utils.run.parameters import Parameters, versions
from utils.run.record import CheckedRun, record_of
from utils.run.tables import read_table, write_table


class Stage:
    """Notebook `stage` at work with the parameters `p`. Files are named without their folder.

    folder: where the run's files, its record and its locks lie; target: where the outputs go.
    """

    def __init__(self, stage: str, p: Parameters, run: str, dtype: str = "float64"):
        self.stage = stage
        self.p = p
        self.run = run
        self.device: str = getattr(p, "device", "cpu")
        self.dtype = dtype
        self.folder = RUNS / run
        self.target = self.folder
        self.start = time.monotonic()
        self.inputs: dict[str, str] = {}  # file -> SHA-256
        self.outside: dict[str, str] = {}
        self.named = named_files(p.model_dump())  # as they were when the stage began
        self.written: dict[str, Path] = {}  # file -> where it waits for `finish`

    # starting

    def open(self) -> None:
        """Look at the inputs, now that the lock is held, and remove what a killed process left."""
        self.checked = CheckedRun(self.run)
        for file in NEEDS[self.stage]:
            self.input_path(file)
        for folder in (self.folder, self.target):
            for leftover in folder.glob(f".{self.stage}.*.tmp"):
                leftover.unlink(missing_ok=True)

    # reading

    def input_path(self, file: str) -> Path:
        """Where a file can be read: one that this stage wrote, or an input, which is then checked.

        Raises FileNotFoundError or ValueError with one sentence where the input is missing, has
        changed or is none of this stage's.
        """
        producer = PRODUCER.get(file, self.stage)
        if producer == self.stage:
            return self.written.get(file, self.target / file)
        if producer not in SOURCES[self.stage]:
            raise ValueError(
                f"notebook {self.stage} cannot read {file}: "
                "say in NEEDS of utils/run/layout.py what it needs."
            )
        self.inputs[file] = self.checked.hash(file)
        return self.checked.path(file)

    def read_npz(self, file: str) -> dict[str, np.ndarray]:
        """The arrays of an .npz file by name; pickled objects are refused."""
        with np.load(self.input_path(file), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def read_json(self, file: str) -> Any:
        """The content of a JSON file."""
        return json.loads(self.input_path(file).read_text())

    def read_csv(self, file: str) -> pd.DataFrame:
        """The table of a CSV file, checked against data/columns.yaml."""
        return read_table(self.input_path(file), file)

    def read_safetensors(self, file: str) -> dict[str, Any]:
        """The tensors of a .safetensors file by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.input_path(file))

    def record_input(self, path: Path | str) -> None:
        """Note the path of a file from outside the run (a user's arrays or weights) in run.json."""
        self.outside[Path(path).name] = sha256(path)

    # writing

    def may_write(self, file: str) -> bool:
        """Whether a file is one of this stage's."""
        return file in WRITES[self.stage]

    @contextmanager
    def writing(self, file: str) -> Iterator[Path]:
        """A temporary path for the block to write; nothing is left of it if the block fails.

        Raises OSError with one sentence where it cannot be written, ValueError where the file is
        none of this stage's.
        """
        if not self.may_write(file):
            raise ValueError(
                f"{file} is not a file of notebook {self.stage}: "
                "add it to WRITES in utils/run/layout.py."
            )
        path = self.target / f".{self.stage}.{file}.tmp"
        try:
            with writable(f"{file} of run {self.run!r}"):
                self.target.mkdir(parents=True, exist_ok=True)
                yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.written[file] = path

    def write_npz(self, file: str, **arrays: np.ndarray) -> None:
        """Write arrays by name to a file (uncompressed; the same arrays give the same bytes)."""
        with self.writing(file) as path, open(path, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    def write_json(self, file: str, value: Any) -> None:
        """Write a value to a file: numbers, text, lists, mappings, numpy scalars and arrays."""
        with self.writing(file) as path:
            path.write_text(as_json(value))

    def write_csv(self, file: str, frame: pd.DataFrame) -> None:
        """Write a frame to a file; its columns are those of data/columns.yaml, in any order."""
        with self.writing(file) as path:
            write_table(path, file, frame)

    def write_safetensors(self, file: str, tensors: dict[str, Any]) -> None:
        """Write tensors by name to a file, copied to the CPU; two that share memory are written
        twice."""
        from safetensors.torch import save

        copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        with self.writing(file) as path:
            path.write_bytes(save(copies))

    # ending

    def finish(self) -> None:
        """Publish every file, then run.json, and give the lock back.

        Everything is on the disk before the first rename, so that a full one changes nothing. If
        the process dies between two renames, run.json no longer agrees with the files and the next
        stage says so.

        Raises ValueError where a file is missing.
        """
        missing = [file for file in WRITES[self.stage] if file not in self.written]
        if missing:
            raise ValueError(
                f"notebook {self.stage} has not written {missing[0]}: write it before finish()."
            )
        entry = self._entry()
        with locks.turn(self.folder):
            for leftover in self.folder.glob(".run.json.*.tmp"):
                leftover.unlink(missing_ok=True)  # of a process that was killed
            stages = record_of(self.run) | {self.stage: entry}
            record = {"run": self.run, "stages": dict(sorted(stages.items()))}
            with writable(f"run.json of run {self.run!r}"):
                with atomic(self.folder / "run.json") as path:
                    path.write_text(as_json(record))
                    for file, written in self.written.items():
                        os.replace(written, self.target / file)
        self.written = {}
        locks.release(self.folder)

    def _entry(self) -> dict[str, Any]:
        return {
            "parameters": self.p.model_dump(),
            "versions": versions(self.device),
            "device": self.device,
            "dtype": self.dtype,
            "seed": getattr(self.p, "seed", None),
            "wall_time_s": round(time.monotonic() - self.start, 2),
            "inputs": self.inputs,
            "outside_inputs": self.outside,
            "named_files": self.named,
            "outputs": {file: sha256(path) for file, path in self.written.items()},
        }
