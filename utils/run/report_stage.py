"""Notebook 07 at work: it reads many runs, locks none of them, and writes the study's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from utils.run.files import sha256
from utils.run.layout import PRODUCER, RESULTS, RUNS
from utils.run.parameters import StudyReport
from utils.run.record import CheckedRun, made_by
from utils.run.stage import Stage
from utils.run.tables import check_schema, read_table

NAN = float("nan")


class ReportStage(Stage):
    """Notebook 07: reads the runs of a study, or what was committed of it where none are given.

    Its record and its lock lie in data/runs/_study_<study>/, its tables in data/results/<study>/.
    """

    p: StudyReport

    def __init__(self, p: StudyReport, dtype: str = "float64"):
        super().__init__("07", p, f"_study_{p.study}", dtype)
        self.target = RESULTS / p.study

    def open(self) -> None:
        """Look at every table of every run."""
        super().open()
        self.runs = {run: CheckedRun(run) for run in self.p.runs}
        for run in self.p.runs:
            for file, producer in PRODUCER.items():
                if file.endswith(".csv") and producer != "07":
                    self.path_of_run(file, run)

    def path_of_run(self, file: str, run: str) -> Path:
        """Where a file of a run lies, as its notebook left it; noted as an input."""
        checked = self.runs[run]
        self.inputs[f"{run}/{file}"] = checked.hash(file)
        return checked.path(file)

    def json_of_run(self, file: str, run: str) -> Any:
        """The content of a JSON file of a run, noted as an input."""
        return json.loads(self.path_of_run(file, run).read_text())

    def may_write(self, file: str) -> bool:
        """Whether a file is one of its own tables, or of those that it pools."""
        return file in PRODUCER

    def read_runs(self, file: str) -> pd.DataFrame:
        """The table `file` of every run of the study, one below the other, first column `run`.

        It goes to data/results/<study>/ too, numbers to 8 digits, and is read back from there:
        without `runs` in the parameters what was committed is read, and gives the same report.
        """
        if self.p.runs and file not in self.written:
            frames = [
                read_table(self.path_of_run(file, run), file).assign(run=run) for run in self.p.runs
            ]
            pooled = check_schema(file, pd.concat(frames, ignore_index=True), pooled=True)
            with self.writing(file) as path:
                pooled.to_csv(
                    path, index=False, na_rep="nan", float_format="%.8g", lineterminator="\n"
                )
        path = self.written.get(file) or self._committed(file)
        return read_table(path, file, pooled=True)

    def read_about(self) -> pd.DataFrame:
        """runs.csv anew from every run's description, or as it was committed without `runs`."""
        if not self.p.runs:
            return read_table(self._committed("runs.csv"))
        return check_schema("runs.csv", pd.DataFrame([self._about(run) for run in self.p.runs]))

    def _committed(self, file: str) -> Path:
        path = self.target / file
        if not path.is_file():
            raise FileNotFoundError(
                f"study {self.p.study!r} has no {file} in {self.target}: run the study first."
            )
        self.record_input(path)
        return path

    def _about(self, run: str) -> dict[str, Any]:
        model = self.json_of_run("model.json", run)
        data = self.json_of_run("dataset.json", run)
        config = model["config"] or {}
        return {
            "run": run,
            "data": data["name"],
            "training": data["sizes"]["train"],
            "calibration": data["sizes"]["calibration"],
            "held_out": data["sizes"]["test"],
            "depth": config.get("depth", NAN),
            "width": config.get("d_model", config.get("width", NAN)),
            "heads": config.get("n_heads", NAN),
            "norm": config.get("norm", ""),
            "accuracy_training": model["accuracy"]["training"],
            "accuracy_held_out": model["accuracy"]["held-out"],
            **{key: model[key] for key in ("model", "parameters", "l2", "seed")},
            **{key: model[key] for key in ("gradient_norm", "threshold", "converged")},
            **made_by(run),
        }

    def finish(self) -> None:
        """As of every stage; runs are not locked, so ValueError where one has changed meanwhile."""
        for name, seen in self.inputs.items():
            if sha256(RUNS / name) != seen:
                raise ValueError(f"{name} has changed while notebook 07 read it: run 07 again.")
        super().finish()
