"""Parameters: what is accepted, and the one sentence that a wrong one gets."""

from pathlib import Path

import pytest
import yaml

from utils.run import parameters
from utils.run.study import defaults

ROOT = Path(__file__).resolve().parents[2]
NORMS = {
    "run": "try",
    "n_per_sample": 5,
    "n_certified": 2,
    "n_pyhessian": 2,
    "n_pool": 30,
    "sizes": [10, 20],
    "n_repeats": 3,
    "n_blocks": 4,
    "probes": 6,
    "steps": 8,
    "confidence": 0.9,
    "device": "cpu",
    "seed": 0,
}
DATA = {
    "run": "try",
    "dataset": "digits",
    "data_root": "",
    "n_samples": 0,
    "calibration_fraction": 0.2,
    "test_fraction": 0.2,
    "order": "random",
    "seed": 0,
}


def sentence(model, values) -> str:
    with pytest.raises(ValueError) as caught:
        parameters.check(model, values)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


def test_values_keep_their_types():
    p = parameters.check(parameters.HessianNorms, NORMS)
    assert p.model_dump() == NORMS
    assert list(parameters.HessianNorms.model_fields) == list(NORMS)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("confidence", "9e-1", 0.9),
        ("n_per_sample", "7", 7),
        ("sizes", "[1, 2]", [1, 2]),
        ("sizes", ["1", "2"], [1, 2]),
    ],
)
def test_text_that_parses_is_accepted(name, text, value):
    assert getattr(parameters.check(parameters.HessianNorms, NORMS | {name: text}), name) == value


def test_yaml_exponent_without_point_is_a_number():
    text = yaml.safe_load("1e-3")
    assert text == "1e-3"
    values = dict.fromkeys(parameters.SampleSize.model_fields, 2)
    values |= {
        "run": "try",
        "tolerances": [text],
        "confidence": 0.9,
        "kurtosis": 3,
        "device": "cpu",
    }
    assert parameters.check(parameters.SampleSize, values).tolerances == [1e-3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probes", "three"),
        ("probes", 5),
        ("probes", 2.5),
        ("probes", True),
        ("probes", None),
        ("n_certified", "false"),
        ("confidence", 1),
        ("confidence", float("nan")),
        ("confidence", "inf"),
        ("sizes", []),
        ("sizes", [2, 2]),
        ("sizes", [0, 1]),
        ("sizes", [True, 2]),
        ("sizes", "[1"),
        ("sizes", 5),
        ("seed", -1),
        ("seed", 2**32),
        ("run", 7),
        ("run", ""),
    ],
)
def test_wrong_values_say_what_to_give(name, value):
    text = sentence(parameters.HessianNorms, NORMS | {name: value})
    assert text.startswith(f"parameter {name} is {value!r}: give ")
    assert text.endswith(".")


def test_exact_sentences():
    assert (
        sentence(parameters.HessianNorms, NORMS | {"n_certified": "three"})
        == "parameter n_certified is 'three': give an integer of at least 1."
    )
    assert (
        sentence(parameters.HessianNorms, NORMS | {"seeed": 1})
        == "unknown parameter seeed: did you mean seed?"
    )
    missing = {k: v for k, v in NORMS.items() if k != "probes"}
    assert sentence(parameters.HessianNorms, missing).startswith(
        "parameter probes is missing: set it"
    )


@pytest.mark.parametrize(
    "run", ["../x", "a/b", "a..b", ".", "..", ".x", "_x", "-x", "a b", "x" * 65, "a\n", "/etc", "ä"]
)
def test_run_names_cannot_leave_the_folder(run):
    assert sentence(parameters.HessianNorms, NORMS | {"run": run}).startswith("parameter run is ")
    assert sentence(parameters.StudyReport, {"study": run, "runs": ["a"]}).startswith(
        "parameter study is "
    )
    assert sentence(parameters.StudyReport, {"study": "a", "runs": [run]}).startswith(
        "parameter runs is "
    )


@pytest.mark.parametrize("run", ["a", "2024", "vit-d2_s0.1", "x" * 64])
def test_plain_run_names(run):
    assert parameters.check(parameters.HessianNorms, NORMS | {"run": run}).run == run


def test_the_parts_leave_something_to_train_on():
    text = sentence(
        parameters.DataPreparation, DATA | {"calibration_fraction": 0.5, "test_fraction": 0.5}
    )
    assert "nothing to train on" in text


# --- validate, as the notebooks call it ----------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [2], [8, 16]])
def test_retraining_may_be_left_out(sizes):
    values = defaults(ROOT / "notebooks" / "05_surface_convergence.ipynb") | {
        "retrain_sizes": sizes
    }
    assert parameters.check(parameters.SurfaceConvergence, values).retrain_sizes == sizes
    for wrong in ([1], [8, 8], [16, 8], 4):
        assert "retrain_sizes" in sentence(
            parameters.SurfaceConvergence, values | {"retrain_sizes": wrong}
        )


CELL = "\n".join(
    f"{name}: {type(value).__name__} = {value!r}  # help" for name, value in NORMS.items()
)


def session(*cells) -> dict:
    """What `globals()` holds in a notebook after these cells."""
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


def test_validate_returns_and_prints(capsys):
    p = parameters.validate(parameters.HessianNorms, session(CELL))
    assert p.model_dump() == NORMS
    out = capsys.readouterr().out
    assert (
        "device cpu, dtype float64, seed 0" in out
        and "torch " in out
        and "probes               6" in out
    )
    parameters.validate(parameters.HessianNorms, session(CELL))
    assert capsys.readouterr().out == out


def test_validate_takes_the_injected_value(capsys):
    p = parameters.validate(parameters.HessianNorms, session(CELL, '# Parameters\nprobes = "8"\n'))
    assert p.probes == 8


@pytest.mark.parametrize(
    "cells",
    [
        (CELL, "# Parameters\nprobs = 8\n"),
        (CELL, "# Parameters\nprobs = float('nan')\n"),
        (CELL + "\nprobs: int = 3  # help",),
    ],
)
def test_a_name_that_no_notebook_knows_is_refused(cells):
    with pytest.raises(ValueError, match=r"^unknown parameter probs: did you mean probes\?$"):
        parameters.validate(parameters.HessianNorms, session(*cells))


def test_other_variables_of_a_session_are_none_of_its_business(capsys):
    scratch = (
        "x = 3",
        "y: int = 4",
        "depth, width = 1, 2",
        "import math",
        "print('probs')",
        "probes = 9",
    )
    assert (
        parameters.validate(
            parameters.HessianNorms, session(*scratch[:-1], CELL, *scratch, CELL)
        ).probes
        == 6
    )
    corrected = session(CELL + "\nprobs: int = 3", CELL)
    assert parameters.validate(parameters.HessianNorms, corrected).probes == 6


def test_validate_outside_a_notebook(capsys):
    assert parameters.validate(parameters.HessianNorms, dict(NORMS, other=1)).model_dump() == NORMS
