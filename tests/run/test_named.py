"""Files that a user names: recorded with their content, and refused once they have changed."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from utils.run import begin, locks
from utils.run.named import modules_of, named_files
from utils.run.parameters import DataPreparation, HessianNorms, ModelTraining
from utils.run.record import record_of

EXTRA = {"run": "own", "device": "cpu", "seed": 0}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    return tmp_path


def test_modules_beside_a_file_that_it_imports():
    files = {
        "mine/net.py": "import torch, layers\nfrom blocks.attention import Heads\nimport os.path",
        "mine/layers.py": "from blocks import small",
        "mine/blocks/__init__.py": "",
        "mine/blocks/attention.py": "from . import small\nfrom .deep.rows import f\nimport net",
        "mine/blocks/small.py": "this does not parse (",
        "mine/blocks/deep/rows.py": "",
        "mine/other.py": "",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    found = {str(p) for p in modules_of(Path("mine/net.py"))}
    assert found == set(files) - {"mine/other.py"}


def test_what_parameters_name():
    for name in ("data.npz", "w.safetensors", "net.py"):
        Path("mine", name).write_text(name)
    values = {"dataset": "npz:mine/data.npz", "model": "mine/net.py:make"}
    values |= {"weights": "mine/w.safetensors", "depth": 3}
    found = named_files(values)
    assert list(found) == ["mine/data.npz", "mine/net.py", "mine/w.safetensors"]
    assert named_files({"dataset": "npz:nowhere.npz", "model": "no.py:make"}) == {}


def finished(stage: str, p) -> None:
    """A notebook that writes little."""
    work = begin(stage, p)
    for file in {"01": ("dataset.npz", "dataset.json"), "02": ("model.json",)}[stage]:
        work.write_json(file, stage)
    if stage == "02":
        work.write_safetensors("model.safetensors", {})
        work.written["training.csv"] = work.target / ".02.training.csv.tmp"
        work.written["training.csv"].write_text("")
    work.finish()


def ready(stage: str):
    models = {"01": DataPreparation, "02": ModelTraining, "03": HessianNorms}
    return models[stage].model_construct(
        **EXTRA, dataset="npz:mine/data.npz", model="mine/net.py:make", weights="mine/w.st"
    )


def opened(stage: str) -> None:
    """Notebook `stage` may begin."""
    locks.release(begin(stage, ready(stage)).folder)


@pytest.mark.parametrize("changed", ["data.npz", "net.py", "layers.py", "w.st"])
def test_later_notebooks_refuse_what_has_changed_since(changed):
    texts = {"data.npz": "1", "net.py": "import layers", "layers.py": "", "w.st": "2"}
    for name, text in texts.items():
        Path("mine", name).write_text(text)
    finished("01", ready("01"))
    finished("02", ready("02"))
    opened("03")
    Path("mine", changed).write_text(texts[changed] + " ")
    stage = "01" if changed == "data.npz" else "02"
    refused(lambda: begin("03", ready("03")), f"mine/{changed} has changed", f"re-run {stage}")
    Path("mine", changed).write_text(texts[changed])
    opened("03")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("stages"), inner),
    max_leaves=8,
)


@pytest.mark.slow
@given(JSON)
def test_a_record_of_any_shape_is_read_or_refused(value):
    Path("data/runs/odd").mkdir(parents=True, exist_ok=True)
    for content in (value, {"stages": value}, {"stages": {"01": value}}):
        Path("data/runs/odd/run.json").write_text(json.dumps(content))
        try:
            assert isinstance(record_of("odd"), dict)
        except ValueError as error:
            assert "damaged" in str(error)


def test_a_record_that_is_no_file(folder):
    for make in (os.mkfifo, os.mkdir):
        Path("data/runs/odd").mkdir(parents=True, exist_ok=True)
        make("data/runs/odd/run.json")
        refused(lambda: record_of("odd"), "damaged")
        os.rmdir("data/runs/odd/run.json") if make is os.mkdir else os.unlink(
            "data/runs/odd/run.json"
        )
