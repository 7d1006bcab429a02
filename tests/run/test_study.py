"""Study files: what they may say, and the one sentence that a wrong one gets."""

import os

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from utils.run.parameters import MODELS
from utils.run.study import read_study


@pytest.fixture
def notebooks(tmp_path):
    """A folder with seven notebooks that have nothing but a parameters cell."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    some = {
        "run": "quickstart",
        "study": "quickstart",
        "runs": ["quickstart"],
        "sizes": [1, 2],
        "radii": [0.1],
    }
    some |= {
        "tolerances": [0.1],
        "rungs": ["prior"],
        "sweeps": [],
        "norm": "pre",
        "activation": "gelu",
        "pool": "cls",
        "weights": "",
    }
    some |= {
        "loss": "mse",
        "model": "vit",
        "dataset": "digits",
        "data_root": "",
        "confidence": 0.9,
        "eps": 1e-5,
    }
    some |= {
        "calibration_fraction": 0.2,
        "test_fraction": 0.2,
        "n_pool": 4,
        "probes": 6,
        "retrain_sizes": [],
    }
    some |= {"order": "random", "schedule": "cosine", "device": "cpu"}
    for stage, model in MODELS.items():
        lines = [
            f"{n}: {type(some.get(n, 2)).__name__} = {some.get(n, 2)!r}  # help"
            for n in model.model_fields
        ]
        cells = [new_markdown_cell(), new_code_cell("\n".join(lines))]
        nbformat.write(new_notebook(cells=cells), folder / f"{stage}_x.ipynb")
    return folder


def study(tmp_path, notebooks, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return read_study(path, notebooks)


def test_a_study_goes_to_every_notebook_that_has_the_parameter(tmp_path, notebooks):
    text = "name: s\nruns:\n- {run: a, parameters: {seed: 3, depth: 4, eps: 1e-3}}\n- {run: b}\n"
    made = study(tmp_path, notebooks, text)
    assert made.runs == ["a", "b"] and made.report == {"study": "s", "runs": ["a", "b"]}
    assert {
        stage: values["seed"] for stage, values in made.parameters["a"].items()
    } == dict.fromkeys(["01", "02", "03", "04", "05", "06"], 3)
    assert made.parameters["a"]["02"]["eps"] == 1e-3 and made.parameters["b"]["02"]["depth"] == 2
    assert made.parameters["a"]["02"]["run"] == "a" and "depth" not in made.parameters["a"]["03"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "name: s\nruns:\n- {run: a, parameters: {depht: 3}}\n",
            "unknown parameter depht: did you mean depth?",
        ),
        (
            "name: s\nruns:\n- {run: a, parameters: {depth: three}}\n",
            "parameter depth is 'three': give an integer",
        ),
        ("name: s\nruns:\n- {run: a, parameters: {run: b}}\n", "unknown parameter run"),
        ("name: s\nruns:\n- {run: ../x}\n", "parameter run is '../x'"),
        ("name: ../s\nruns:\n- {run: x}\n", "name is '../s'"),
        (
            "name: t\nruns:\n- {run: x}\n",
            "says name: t, but its results go by the file's name: write name: s.",
        ),
        ("name: s\nruns:\n- {run: a}\n- {run: a}\n", "two runs named 'a'"),
        (
            "name: s\nruns:\n- {run: a, parameters: {depth: 3, depth: 5}}\n",
            "'depth' is given twice",
        ),
        ("name: s\nruns: []\nruns:\n- {run: a}\n", "'runs' is given twice"),
        ("name: s\nruns:\n- {run: a, seed: 3}\n", "holds the run {'run': 'a', 'seed': 3}: give"),
        ("name: s\nruns:\n- {run: [a]}\n", "parameter run is ['a']"),
        ("[]", "is not a study"),
        ("name: s\nruns: []\n", "has no runs: give"),
        ("name: s\n", "is not a study"),
        ("name: s\nrun: a\nruns: []\n", "is not a study"),
        ("name: s\nruns: [a]\n", "holds the run 'a'"),
        ("name: s\nruns:\n- {run: a, parameters: [1]}\n", "not a mapping"),
        ("name: [\n", "is not a readable YAML file"),
        ("name: !!python/object/apply:os.getcwd []\nruns: []", "is not a readable YAML file"),
    ],
)
def test_a_wrong_study_is_one_sentence(tmp_path, notebooks, text, says):
    with pytest.raises(ValueError) as caught:
        study(tmp_path, notebooks, text)
    assert (
        says in str(caught.value)
        and "\n" not in str(caught.value)
        and "s.yaml" in str(caught.value)
    )


def test_a_study_that_is_not_there(tmp_path, notebooks):
    with pytest.raises(ValueError, match="there is no study file"):
        read_study(tmp_path / "none.yaml", notebooks)


def test_a_file_whose_name_cannot_be_a_studys_goes_by_its_own(tmp_path):
    path = tmp_path / "mine ü.yaml"
    path.write_text("name: mine\nruns:\n- {run: a}\n", encoding="utf-8")
    assert read_study(path).name == "mine"
    (tmp_path / "mine.yaml").write_text("name: mine\nruns:\n- {run: a}\n")
    with pytest.raises(ValueError, match="says name: mine"):
        read_study(path)


def test_a_study_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "s.yaml")
    with pytest.raises(ValueError, match="is no file"):
        read_study(tmp_path / "s.yaml")
