"""Executed copies of the notebooks: where they lie, and how their outputs come back.

Executed copies lie at data/runs/<run>/notebooks/, that of notebook 07 at
data/runs/_study_<study>/notebooks/.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from utils.run.files import atomic
from utils.run.layout import RUNS
from utils.run.record import record_of
from utils.run.study import Study, read_study

NOTEBOOKS = Path("notebooks")
NAMES = {
    "01": "01_data_preparation",
    "02": "02_model_training",
    "03": "03_hessian_norms",
    "04": "04_bound_comparison",
    "05": "05_surface_convergence",
    "06": "06_sample_size",
    "07": "07_study_report",
}
RECORDS = ("papermill", "execution")  # metadata that two equal runs do not share


def read(path: Path | str) -> NotebookNode:
    """A notebook as it stands on disk.

    Raises ValueError where it is not one.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, KeyError, TypeError):  # NotJSONError is a ValueError
        raise ValueError(f"{path} is not a notebook: restore it with git checkout.") from None


def write(path: Path | str, notebook: NotebookNode) -> None:
    """Write as Jupyter does, whole or not at all."""
    with atomic(path) as temporary:
        nbformat.write(notebook, temporary)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold something."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def executed_path(stage: str, run: str) -> Path:
    """Where the executed copy of a notebook ("01" to "07") lies; of 07, `run` is the study.

    >>> executed_path("01", "try").as_posix()
    'data/runs/try/notebooks/01_data_preparation.ipynb'
    """
    folder = f"_study_{run}" if stage == "07" else run
    return RUNS / folder / "notebooks" / f"{NAMES[stage]}.ipynb"


def normalise(executed: Path | str, target: Path | str) -> None:
    """An executed copy without what differs between two equal runs: the injected cell, ids of
    jobs, times, standard error, counts, and the pieces in which printed text arrived."""
    notebook = read(executed)
    injected = "injected-parameters"
    notebook.cells = [c for c in notebook.cells if injected not in c.metadata.get("tags", [])]
    notebook.metadata.get("language_info", {}).pop("version", None)
    for part in (notebook, *notebook.cells):
        for key in RECORDS:
            part.metadata.pop(key, None)
    for count, cell in enumerate(code_cells(notebook), 1):
        _put(cell, cell.outputs, count)
    write(target, notebook)


def _put(cell: NotebookNode, outputs: list[NotebookNode], count: int) -> None:
    """Give a cell its outputs, without standard error, and its execution count."""
    cell.execution_count = count
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "execution_count" in output:
            output.execution_count = count
        follows = kept and kept[-1].output_type == "stream"
        if follows and output.output_type == "stream":  # a slow machine sends text in pieces
            kept[-1].text += output.text
        else:
            kept.append(output)
    cell.outputs = kept


def _code(cell: NotebookNode) -> str:
    """A cell's code without comments and layout; its text where it does not parse."""
    try:
        return ast.dump(ast.parse(cell.source))
    except SyntaxError:
        return cell.source


def merge_outputs(template: Path | str, executed: Path | str) -> list[str]:
    """Bring an executed copy's outputs into the template: by cell id, where the code is the same.

    Returns the ids of code cells that were left alone. All else in the template stays as it is.
    """
    notebook = read(template)
    done = {cell.id: cell for cell in code_cells(read(executed))}
    left = []
    for count, cell in enumerate(code_cells(notebook), 1):
        twin = done.get(cell.id)
        if twin is not None and _code(twin) == _code(cell):
            _put(cell, twin.outputs, count)
            continue
        left.append(cell.id)
        if cell.execution_count is not None:
            cell.execution_count = count
    write(template, notebook)
    return left


def merge_study(path: Path | str) -> None:
    """Merge the outputs of the study's first run, and of its report, into notebooks/.

    path: the study file.

    Raises ValueError where a run was last made with other parameters than the study's (by hand,
    say), or was never made.
    """
    study = read_study(path, NOTEBOOKS)
    for run, stages in study.parameters.items():
        record = record_of(run)
        for stage, wanted in stages.items():
            if record.get(stage, {}).get("parameters") != wanted:
                raise ValueError(
                    f"run {run!r} was last made by notebook {stage} with other parameters than "
                    f"{path} gives: delete {RUNS / run} and repeat."
                )
    for stage, executed in copies(study).items():
        if not executed.is_file():
            raise ValueError(
                f"there is no executed copy {executed}: delete {executed.parents[1]} and repeat."
            )
        left = merge_outputs(NOTEBOOKS / executed.name, executed)
        if left:
            said = f"{len(left)} cells were edited meanwhile and keep their outputs."
            print(f"{NAMES[stage]}: {said}", file=sys.stderr)


def copies(study: Study) -> dict[str, Path]:
    """By stage the executed copies of the study's first run and of its report."""
    names = {stage: study.name if stage == "07" else study.runs[0] for stage in NAMES}
    return {stage: executed_path(stage, name) for stage, name in names.items()}


def render(study: Study) -> None:
    """Copies of the executed notebooks of the study's first run, and of its report, into
    notebooks/rendered/<run>/.

    Raises FileNotFoundError where one has not been executed; nothing is copied then.
    """
    run = study.runs[0]
    notebooks = {}
    for stage, path in copies(study).items():
        if not path.is_file() or not whole(read(path)):
            raise FileNotFoundError(
                f"run {run!r} has no executed notebook {stage}: run the study first."
            )
        notebooks[path.name] = read(path)
    for name, notebook in notebooks.items():
        write(NOTEBOOKS / "rendered" / run / name, notebook)


def whole(notebook: NotebookNode) -> bool:
    """Whether every code cell was executed, without an error."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    failed = any(o.output_type == "error" for cell in cells for o in cell.outputs)
    return bool(cells) and not failed and all(cell.execution_count for cell in cells)


def last_error(path: Path | str) -> str:
    """The last line that a failed papermill printed: the sentence of the error."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[-1]
