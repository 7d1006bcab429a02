"""Executed copies: normalised, merged back, rendered."""

import copy
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from little_notebook import cell, stream

from utils.run.study import Study, read_study
from workflow.checks import problems
from workflow.execution import (
    NAMES,
    code_cells,
    executed_path,
    last_error,
    merge_outputs,
    merge_study,
    normalise,
    read,
    render,
    write,
)

ROOT = Path(__file__).resolve().parents[2]


def test_outputs_come_back_by_id_where_the_code_is_the_same(good, tmp_path):
    path, notebook = good
    executed = copy.deepcopy(notebook)
    injected = cell(
        "code",
        "# Parameters\nx = 1",
        "zzz",
        metadata={"tags": ["injected-parameters"]},
        execution_count=2,
    )
    executed["cells"][2]["outputs"] = [stream("new\n"), stream("noise\n", "stderr")]
    executed["cells"][4].update(outputs=[stream("1\n")], source="print(x)  # the value")
    executed["cells"].insert(2, injected)
    executed["cells"][0]["source"] = "# Old title"
    executed["metadata"]["papermill"] = {"duration": 3}
    write(tmp_path / "executed.ipynb", executed)
    assert merge_outputs(path, tmp_path / "executed.ipynb") == []
    merged = read(path)
    assert [c["execution_count"] for c in code_cells(merged)] == [1, 2, 3]
    assert merged["cells"][2]["outputs"] == [stream("new\n")] and merged["cells"][4]["outputs"] == [
        stream("1\n")
    ]
    expected = copy.deepcopy(notebook)
    expected["cells"][2]["outputs"], expected["cells"][4]["outputs"] = (
        [stream("new\n")],
        [stream("1\n")],
    )
    assert merged == expected and problems(path) == []
    before = path.read_bytes()
    merge_outputs(path, tmp_path / "executed.ipynb")
    assert path.read_bytes() == before


def test_an_edited_cell_keeps_what_it_has(good, tmp_path):
    path, notebook = good
    executed = copy.deepcopy(notebook)
    executed["cells"][2].update(source="x = 5", outputs=[stream("of another code\n")])
    write(tmp_path / "executed.ipynb", executed)
    notebook["cells"].insert(3, cell("code", "y = 1", "new"))
    write(path, notebook)
    assert merge_outputs(path, tmp_path / "executed.ipynb") == ["check", "new"]
    merged = read(path)
    assert (
        merged["cells"][2]["outputs"] == [stream("fine\n")]
        and merged["cells"][3] == notebook["cells"][3]
    )


def test_writing_is_what_jupyter_writes(good):

    path, _ = good
    before = path.read_text()
    nbformat.write(nbformat.read(path, as_version=4), path)
    assert path.read_text().rstrip("\n") == before.rstrip("\n")


def test_normalised_copies_of_equal_runs_are_equal(good, tmp_path):
    _, notebook = good
    made = []
    for time, pieces in (
        ("2026-01-01", ["fine\nand more\n"]),
        ("2027-01-01", ["fine\n", "and ", "more\n"]),
    ):
        executed = copy.deepcopy(notebook)
        executed["metadata"] |= {
            "papermill": {"start_time": time},
            "language_info": {"name": "python", "version": time},
        }
        for c in executed["cells"]:
            c["metadata"] |= {
                "papermill": {"start_time": time},
                "execution": {"iopub.execute_input": time},
            }
        noise = stream(time, "stderr")
        executed["cells"][2]["outputs"] = [o for text in pieces for o in (stream(text), noise)]
        executed["cells"].insert(
            2, cell("code", f"x = '{time}'", "i", metadata={"tags": ["injected-parameters"]})
        )
        write(tmp_path / "in.ipynb", executed)
        normalise(tmp_path / "in.ipynb", tmp_path / f"{time}.ipynb")
        made.append((tmp_path / f"{time}.ipynb").read_text())
    assert made[0] == made[1] and "2026" not in made[0] and "injected" not in made[0]
    assert json.loads(made[0])["cells"][2]["outputs"] == [
        stream("fine\n") | {"text": ["fine\n", "and more\n"]}
    ]


def test_merging_refuses_a_run_made_with_other_parameters(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    study = read_study("studies/quickstart.yaml")
    rest = {"versions": {}, "device": "cpu", "inputs": {}, "outputs": {}}
    values = copy.deepcopy(study.parameters["quickstart"])
    stages = {stage: rest | {"parameters": given} for stage, given in values.items()}
    stages["02"]["parameters"]["seed"] = 99
    (tmp_path / "data" / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "data" / "runs" / "quickstart" / "run.json").write_text(
        json.dumps({"stages": stages})
    )
    with pytest.raises(ValueError, match="was last made by notebook 02 with other parameters"):
        merge_study("studies/quickstart.yaml")


def test_the_last_line_of_a_failure(tmp_path):
    (tmp_path / "errors.txt").write_text(
        "Traceback\n\x1b[31mValueError\x1b[0m: depth is 0: give 1.\n\n"
    )
    assert last_error(tmp_path / "errors.txt") == "ValueError: depth is 0: give 1."


def test_rendered_copies_are_the_executed_ones(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = Study("s", ["a", "b"], {})
    for stage in NAMES:
        path = executed_path(stage, "s" if stage == "07" else "a")
        path.parent.mkdir(parents=True, exist_ok=True)
        if stage == "07":
            with pytest.raises(
                FileNotFoundError,
                match=r"^run 'a' has no executed notebook 07: run the study first",
            ):
                render(study)
            assert not Path("notebooks/rendered").exists()
        shutil.copy(good[0], path)
    render(study)
    assert sorted(p.stem for p in Path("notebooks/rendered/a").iterdir()) == sorted(NAMES.values())
