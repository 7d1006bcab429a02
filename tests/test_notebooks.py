"""The committed notebooks keep their rules; hashing, merging and normalising do what the Snakefile relies on."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest

from utils import notebooks, params, runs

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = [ROOT / "notebooks" / f"{name}.ipynb" for name in notebooks.NAMES.values()]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_keeps_the_rules(path):
    assert notebooks.problems(path) == []


def test_there_are_no_other_notebooks():
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == COMMITTED


def test_quickstart_sets_nothing_but_the_defaults():
    study = params.read_study(ROOT / "studies" / "quickstart.yaml", ROOT / "notebooks")
    assert study.name == "quickstart" and study.runs == ["quickstart"]
    for stage, values in (study.parameters["quickstart"] | {"07": study.report}).items():
        assert values == params.defaults(ROOT / "notebooks" / f"{notebooks.NAMES[stage]}.ipynb")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_is_valid(path):
    params.read_study(path, ROOT / "notebooks")


@pytest.mark.parametrize("stage", params.MODELS)
def test_models_and_stages_agree(stage):
    assert stage in runs.STAGES and stage in notebooks.NAMES


# --- the rules notice a breach -------------------------------------------------------------------


def cell(kind: str, text: str, name: str, **more) -> dict:
    made = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(True)} | more
    return made if kind == "markdown" else {"outputs": [], "execution_count": None} | made


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


@pytest.fixture
def good(tmp_path) -> tuple[Path, dict]:
    """A notebook 07 that keeps every rule."""
    parameters = 'study: str = "quickstart"  # name of the study\nruns: list = ["quickstart"]  # its runs'
    notebook = {
        "cells": [
            cell("markdown", "# Report\n[data](../data.md) [web](https://example.org/a/b.c)", "title"),
            cell("code", parameters, "parameters", metadata={"tags": ["parameters"]}, execution_count=1),
            cell("code", "x = 1", "check", execution_count=2, outputs=[stream("fine\n")]),
            cell("markdown", "A sentence with $|x|$.\n\n| a | b |\n|---|---|\n| $x$ | 1/2 |", "prose"),
            cell("code", "print(x)", "body", execution_count=3),
        ],
        "metadata": {"kernelspec": {"name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "data.md").write_text("data")
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "07_study_report.ipynb"
    notebooks.write(path, notebook)
    return path, notebook


def test_a_good_notebook_has_no_problems(good):
    path, notebook = good
    assert notebooks.problems(path) == []
    for c in notebooks.code_cells(notebook):
        c["execution_count"], c["outputs"] = None, []
    notebooks.write(path, notebook)
    assert notebooks.problems(path) == []


BREACHES = {
    "tagged `parameters`": lambda n: n["cells"][1]["metadata"].clear(),
    "only it": lambda n: n["cells"][2]["metadata"].update(tags=["parameters"]),
    "not a literal": lambda n: n["cells"][1]["source"].append("\nimport os"),
    "is not of type": lambda n: n["cells"][1].update(source=["study: str = 3  # x\n", "runs: list = []  # x"]),
    "no trailing comment": lambda n: n["cells"][1].update(source=["study: str = '#'\n", "runs: list = []  # x"]),
    "make them agree": lambda n: n["cells"][1].update(source=["studdy: str = ''  # x\n", "runs: list = []  # x"]),
    "execution counts": lambda n: n["cells"][2].update(execution_count=7),
    "widgets": lambda n: n["metadata"].update(widgets={}),
    "under 1 MB": lambda n: n["cells"][2]["outputs"].append(stream("x" * 1_000_000)),
    "more than 25 lines": lambda n: n["cells"][4].update(source=["x = 1\n"] * 26),
    "magic": lambda n: n["cells"][4].update(source=["%matplotlib inline"]),
    "shell": lambda n: n["cells"][4].update(source=["!ls"]),
    "carries an error": lambda n: n["cells"][4]["outputs"].append({"output_type": "error", "traceback": []}),
    "standard error": lambda n: n["cells"][4]["outputs"].append(stream("x", "stderr")),
    "JavaScript": lambda n: n["cells"][4]["outputs"].append(
        {"output_type": "display_data", "data": {"application/javascript": "x"}}
    ),
    "absolute path /home/me/x.csv": lambda n: n["cells"][4]["outputs"].append(stream("see /home/me/x.csv\n")),
    "absolute path /srv/data": lambda n: n["cells"][4].update(source=["open('/srv/data')"]),
    "prose shows the absolute path": lambda n: n["cells"][3]["source"].append("\nin `/usr/share/x`"),
    "no sentence before": lambda n: n["cells"].pop(3),
    "heading holds math": lambda n: n["cells"][3]["source"].append("\n## Norm $x$"),
    "math in a table": lambda n: n["cells"][3]["source"].append("\n| $|x|$ | 1 |"),
    "link none.md": lambda n: n["cells"][3]["source"].append("\n[x](none.md)"),
    "link ../utils/none.py#L3": lambda n: n["cells"][3]["source"].append("\n[x](../utils/none.py#L3)"),
}


@pytest.mark.parametrize("says", BREACHES)
def test_a_breach_is_noticed(good, says):
    path, notebook = good
    BREACHES[says](notebook)
    notebooks.write(path, notebook)
    assert any(says in problem for problem in notebooks.problems(path)), notebooks.problems(path)


# --- what a notebook depends on ------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, good) -> Path:
    """A notebook that imports utils.a, which imports utils.b; utils.c stands aside."""
    path, notebook = good
    notebook["cells"][4]["source"] = ["from utils.a import f\n", "f()"]
    notebooks.write(path, notebook)
    (tmp_path / "utils").mkdir()
    for name, text in {
        "__init__": '"""Package."""\n',
        "a": '"""Doc."""\n\nfrom utils import b\n\n\ndef f():\n    """Doc."""\n    return b.g()  # why\n',
        "b": "def g():\n    return 1\n",
        "c": "x = 1\n",
    }.items():
        (tmp_path / "utils" / f"{name}.py").write_text(text)
    return tmp_path


def hash_of(tree: Path) -> str:
    return notebooks.code_hash(tree / "notebooks" / "07_study_report.ipynb", tree)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("notebooks/07_study_report.ipynb", "A sentence", "Another sentence", False),
        ("notebooks/07_study_report.ipynb", "# name of the study", "# the study", False),
        ("notebooks/07_study_report.ipynb", "fine", "another output", False),
        ("notebooks/07_study_report.ipynb", "x = 1", "x = 2", True),
        ("notebooks/07_study_report.ipynb", '= \\"quickstart\\"', '= \\"other\\"', True),
        ("utils/a.py", "Doc.", "Other.", False),
        ("utils/a.py", "# why", "# because", False),
        ("utils/a.py", "return b.g()", "return  b.g()", False),
        ("utils/a.py", "b.g()", "b.g() + 1", True),
        ("utils/b.py", "return 1", "return 2", True),
        ("utils/c.py", "x = 1", "x = 2", False),
        ("utils/__init__.py", '"""Package."""', "x = 1", True),
    ],
)
def test_the_hash_sees_code_and_nothing_else(tree, file, old, new, changes):
    before = hash_of(tree)
    edit(tree / file, old, new)
    assert (hash_of(tree) != before) == changes


@pytest.mark.parametrize(
    "statement",
    [
        "import utils.a",
        "from utils import a",
        "from utils.a import f",
        "import utils.a as z",
        "def g():\n    import utils.a",
    ],
)
def test_the_hash_follows_every_form_of_import(tree, statement):
    path = tree / "notebooks" / "07_study_report.ipynb"
    notebook = notebooks.read(path)
    notebook["cells"][4]["source"] = [statement]
    notebooks.write(path, notebook)
    before = hash_of(tree)
    edit(tree / "utils" / "b.py", "return 1", "return 2")
    assert hash_of(tree) != before
    edit(tree / "utils" / "a.py", "from utils import b", "from . import b")
    before = hash_of(tree)
    edit(tree / "utils" / "b.py", "return 2", "return 3")
    assert hash_of(tree) != before


def test_code_that_does_not_parse_is_one_sentence(tree):
    edit(tree / "utils" / "b.py", "return 1", "return (")
    with pytest.raises(ValueError, match="does not parse"):
        hash_of(tree)


# --- merging and normalising ---------------------------------------------------------------------


def test_outputs_come_back_by_id_where_the_code_is_the_same(good, tmp_path):
    path, notebook = good
    executed = copy.deepcopy(notebook)
    injected = cell("code", "# Parameters\nx = 1", "zzz", metadata={"tags": ["injected-parameters"]}, execution_count=2)
    executed["cells"][2]["outputs"] = [stream("new\n"), stream("noise\n", "stderr")]
    executed["cells"][4].update(outputs=[stream("1\n")], source=["print(x)  # the value"])
    executed["cells"].insert(2, injected)
    executed["cells"][0]["source"] = ["# Old title"]
    executed["metadata"]["papermill"] = {"duration": 3}
    notebooks.write(tmp_path / "executed.ipynb", executed)
    assert notebooks.merge_outputs(path, tmp_path / "executed.ipynb") == []
    merged = notebooks.read(path)
    assert [c["execution_count"] for c in notebooks.code_cells(merged)] == [1, 2, 3]
    assert merged["cells"][2]["outputs"] == [stream("new\n")] and merged["cells"][4]["outputs"] == [stream("1\n")]
    expected = copy.deepcopy(notebook)
    expected["cells"][2]["outputs"], expected["cells"][4]["outputs"] = [stream("new\n")], [stream("1\n")]
    assert merged == expected and notebooks.problems(path) == []
    before = path.read_bytes()
    notebooks.merge_outputs(path, tmp_path / "executed.ipynb")
    assert path.read_bytes() == before


def test_an_edited_cell_keeps_what_it_has(good, tmp_path):
    path, notebook = good
    executed = copy.deepcopy(notebook)
    executed["cells"][2].update(source=["x = 5"], outputs=[stream("of another code\n")])
    notebooks.write(tmp_path / "executed.ipynb", executed)
    notebook["cells"].insert(3, cell("code", "y = 1", "new"))
    notebooks.write(path, notebook)
    assert notebooks.merge_outputs(path, tmp_path / "executed.ipynb") == ["check", "new"]
    merged = notebooks.read(path)
    assert merged["cells"][2]["outputs"] == [stream("fine\n")] and merged["cells"][3] == notebook["cells"][3]


def test_writing_is_what_jupyter_writes(good):
    import nbformat

    path, _ = good
    before = path.read_text()
    nbformat.write(nbformat.read(path, as_version=4), path)
    assert path.read_text().rstrip("\n") == before.rstrip("\n")


def test_normalised_copies_of_equal_runs_are_equal(good, tmp_path):
    _, notebook = good
    made = []
    for time, pieces in (("2026-01-01", ["fine\nand more\n"]), ("2027-01-01", ["fine\n", "and ", "more\n"])):
        executed = copy.deepcopy(notebook)
        executed["metadata"] |= {
            "papermill": {"start_time": time},
            "language_info": {"name": "python", "version": time},
        }
        for c in executed["cells"]:
            c["metadata"] |= {"papermill": {"start_time": time}, "execution": {"iopub.execute_input": time}}
        noise = stream(time, "stderr")
        executed["cells"][2]["outputs"] = [o for text in pieces for o in (stream(text), noise)]
        executed["cells"].insert(2, cell("code", f"x = '{time}'", "i", metadata={"tags": ["injected-parameters"]}))
        notebooks.write(tmp_path / "in.ipynb", executed)
        notebooks.normalise(tmp_path / "in.ipynb", tmp_path / f"{time}.ipynb")
        made.append((tmp_path / f"{time}.ipynb").read_text())
    assert made[0] == made[1] and "2026" not in made[0] and "injected" not in made[0]
    assert json.loads(made[0])["cells"][2]["outputs"] == [stream("fine\n") | {"text": ["fine\n", "and more\n"]}]


def test_merging_refuses_a_run_made_with_other_parameters(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    study = params.read_study("studies/quickstart.yaml")
    stages = {s: {"parameters": v} for s, v in copy.deepcopy(study.parameters["quickstart"]).items()}
    stages["02"]["parameters"]["seed"] = 99
    (tmp_path / "data" / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "data" / "runs" / "quickstart" / "run.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(ValueError, match="was last made by notebook 02 with other parameters"):
        notebooks.merge_study("studies/quickstart.yaml")


def test_the_last_line_of_a_failure(tmp_path):
    (tmp_path / "errors.txt").write_text("Traceback\n\x1b[31mValueError\x1b[0m: depth is 0: give 1.\n\n")
    assert notebooks.last_error(tmp_path / "errors.txt") == "ValueError: depth is 0: give 1."


def test_pages_hold_the_committed_findings_and_the_dictionary():
    readme, data = (ROOT / "README.md").read_text(), (ROOT / "data" / "README.md").read_text()
    assert notebooks.findings_table("quickstart") in readme
    assert notebooks.dictionary() in data


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "data/README.md"])
def test_links_of_pages_resolve(page):
    path = ROOT / page
    links = [link for link in notebooks.LINK.findall(path.read_text()) if not re.match(r"[a-z]+:", link)]
    assert all((path.parent / link.split("#")[0]).exists() for link in links), links


def test_progress_has_a_rate_and_a_remaining_time(capsys):
    lines = ["Select jobs to execute...\n", "12:00:00 start a\n", "1 of 6 steps (17%) done\n", "error: x\n"]
    times = iter([0.0, 30.0])
    notebooks.progress(lines, lambda: next(times))
    said = capsys.readouterr().out.splitlines()
    assert said == ["12:00:00 start a", "1 of 6 notebooks, 2 a minute, 0:02:30 left", "error: x"]


def test_rendered_copies_are_the_executed_ones(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = params.Study("s", ["a", "b"], {})
    for stage in notebooks.NAMES:
        path = notebooks.executed_path(stage, "s" if stage == "07" else "a")
        path.parent.mkdir(parents=True, exist_ok=True)
        if stage == "07":
            with pytest.raises(FileNotFoundError, match=r"^run 'a' has no executed notebook 07: run the study first"):
                notebooks.render(study)
            assert not Path("notebooks/rendered").exists()
        shutil.copy(good[0], path)
    notebooks.render(study)
    assert sorted(p.stem for p in Path("notebooks/rendered/a").iterdir()) == sorted(notebooks.NAMES.values())


def test_pages_of_all_notebooks(tmp_path, monkeypatch):
    (tmp_path / "rendered").mkdir()
    for name in ("01_data_preparation.ipynb", "rendered/other.ipynb"):
        shutil.copy(ROOT / "notebooks/01_data_preparation.ipynb", tmp_path / name)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    index = notebooks.html(tmp_path / "site")
    links = re.findall(r'href="([^"]+)"', index.read_text(encoding="utf-8"))
    assert links == ["01_data_preparation.html", "rendered/other.html"]  # under the run that each comes from
    assert re.findall("<h2>(.+?)</h2>", index.read_text(encoding="utf-8")) == ["quickstart", "rendered"]
    pages = [(index.parent / link).read_text(encoding="utf-8") for link in links]
    assert all('href="02_model_training.html"' in page and "data:image/png" in page for page in pages)
