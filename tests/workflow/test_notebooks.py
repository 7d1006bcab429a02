"""The committed notebooks, studies and pages keep their rules."""

from pathlib import Path

import pytest

from utils.report.networks import networks_table
from utils.run.layout import NEEDS, WRITES
from utils.run.parameters import MODELS
from utils.run.study import defaults, read_study
from workflow.checks import problems
from workflow.execution import NAMES
from workflow.pages import dictionary, fill, findings_table, summary

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = [ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES.values()]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_keeps_the_rules(path):
    assert problems(path) == []


def test_there_are_no_other_notebooks():
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == COMMITTED


def test_quickstart_sets_nothing_but_the_defaults():
    study = read_study(ROOT / "studies" / "quickstart.yaml", ROOT / "notebooks")
    assert study.name == "quickstart" and study.runs == ["quickstart"]
    for stage, values in (study.parameters["quickstart"] | {"07": study.report}).items():
        assert values == defaults(ROOT / "notebooks" / f"{NAMES[stage]}.ipynb")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_study_is_valid(path):
    read_study(path, ROOT / "notebooks")


def test_models_and_stages_agree():
    assert list(MODELS) == list(WRITES) == list(NEEDS) == list(NAMES)


def test_pages_hold_the_committed_findings_and_the_dictionary():
    assert findings_table("quickstart") in (ROOT / "docs" / "findings.md").read_text()
    assert networks_table() in (ROOT / "README.md").read_text()
    assert dictionary() in (ROOT / "data" / "README.md").read_text()


def test_a_page_is_filled_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- x -->\nold\n<!-- /x -->\nend\n")
    fill(page, "x", "new\n")
    assert page.read_text() == "# Title\n<!-- x -->\n\nnew\n\n<!-- /x -->\nend\n"


def test_a_summary_says_where_everything_lies(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = summary("quickstart")
    assert "slope" in text and "data/results/quickstart/findings.csv" in text
    with pytest.raises(
        FileNotFoundError, match=r"^there are no findings of study 'never': run `make"
    ):
        summary("never")
