"""run.json: with what parameters, versions and inputs each notebook made a run's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from utils.run.files import sha256
from utils.run.layout import PRODUCER, RUNS


class _Entry(TypedDict):
    """What is read of a notebook's entry; it has more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    parameters: dict[str, Any]
    versions: dict[str, str]
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    named_files: NotRequired[dict[str, str]]


STAGES_OF_A_RECORD = TypeAdapter(dict[str, _Entry])


def record_of(run: str) -> dict[str, dict[str, Any]]:
    """The stages of a run's run.json, by stage ("01" to "07"); empty where there is none.

    Raises ValueError where the file is damaged.

    >>> record_of("a run that never was")
    {}
    """
    path = RUNS / run / "run.json"
    if not path.exists():
        return {}
    try:
        text = path.read_text() if path.is_file() else ""  # a pipe would never end
        stages = STAGES_OF_A_RECORD.validate_python(json.loads(text)["stages"])
        return {stage: dict(entry) for stage, entry in stages.items()}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is damaged: delete the folder {path.parent} and start with notebook 01."
        ) from None


def made_by(run: str) -> dict[str, str]:
    """Columns `torch` and `gpu` of runs.csv: with what notebooks 02 to 06 of a run were made."""
    record = {stage: e for stage, e in sorted(record_of(run).items()) if "02" <= stage <= "06"}
    torches = {entry["versions"]["torch"].partition("+")[0] for entry in record.values()}
    gpus: dict[str, list[str]] = {}
    for stage, entry in record.items():
        if entry["device"] != "cpu":
            gpus.setdefault(entry["versions"]["gpu"], []).append(stage)
    gpu = "; ".join(f"{name}: {' '.join(stages)}" for name, stages in gpus.items())
    return {"torch": ", ".join(sorted(torches)), "gpu": gpu}


class CheckedRun:
    """A run's files, each compared with what its notebook, and those before it, read and wrote."""

    def __init__(self, run: str):
        self.run = run
        self.folder = RUNS / run
        self.record = record_of(run)
        self.hashes: dict[str, str] = {}

    def path(self, file: str) -> Path:
        """Where a file of the run lies."""
        return self.folder / file

    def hash(self, file: str) -> str:
        """SHA-256 of a file that is as its producer left it, made from inputs that still are as
        the producer read them, and the user's own files as well.

        Raises FileNotFoundError where it is missing, ValueError where it, an input, or a file that
        the user named has changed.
        """
        if file not in self.hashes:
            self.hashes[file] = self._checked(file)
        return self.hashes[file]

    def _checked(self, file: str) -> str:
        stage = PRODUCER[file]
        if stage not in self.record or not self.path(file).is_file():
            raise FileNotFoundError(f"run {self.run!r} has no {file}: run notebook {stage} first.")
        for named, seen in self.record[stage].get("named_files", {}).items():
            given = Path(named).expanduser()
            if given.is_file() and sha256(given) != seen:
                raise ValueError(
                    f"{named} has changed since notebook {stage} of run {self.run!r} used it: "
                    f"re-run {stage}."
                )
        for earlier, seen in self.record[stage]["inputs"].items():
            if self.hash(earlier) != seen:
                raise ValueError(
                    f"{earlier} of run {self.run!r} has changed since notebook {stage} read it: "
                    f"re-run {stage}."
                )
        content = sha256(self.path(file))
        if content != self.record[stage]["outputs"].get(file):
            raise ValueError(
                f"{file} of run {self.run!r} is not what notebook {stage} wrote: re-run {stage}."
            )
        return content
