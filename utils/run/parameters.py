"""What each notebook may be told: one model per notebook, with types and ranges.

Defaults stand only in a notebook's parameters cell. A wrong name, type or range raises
`ValueError` with one sentence that says what is wrong and what to do.
"""

from __future__ import annotations

import ast
import difflib
import platform
from importlib import metadata
from typing import Any

from pydantic import ValidationError, model_validator

from utils.run.fields import (
    AtLeastTwo,
    Count,
    Device,
    Fraction,
    Name,
    Names,
    Natural,
    NonEmpty,
    NotNegative,
    Parameters,
    Positive,
    Positives,
    Real,
    Seed,
    Sizes,
    SizesOrNone,
    Text,
    choice,
    choices,
    described,
    whole_from,
)
from utils.run.layout import RUNGS

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "scikit-learn")
INJECTED = "# Parameters"  # how the cell begins that papermill adds


class DataPreparation(Parameters):
    """Notebook 01."""

    run: Name
    dataset: NonEmpty
    data_root: Text
    n_samples: Natural
    calibration_fraction: Fraction
    test_fraction: Fraction
    order: choice("random", "published")
    seed: Seed

    @model_validator(mode="after")
    def _leaves_training_examples(self) -> DataPreparation:
        if self.calibration_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"calibration_fraction {self.calibration_fraction} and "
                f"test_fraction {self.test_fraction} leave nothing to train on: "
                "choose them with a sum below 1."
            )
        return self


class ModelTraining(Parameters):
    """Notebook 02."""

    run: Name
    model: NonEmpty
    weights: Text
    patch_size: Count
    d_model: Count
    n_heads: Count
    depth: Count
    d_ff: Count
    norm: choice("pre", "post")
    activation: choice("gelu", "gelu_tanh", "relu")
    pool: choice("cls", "mean")
    eps: Positive
    loss: choice("cross_entropy", "mse", "bce")
    l2: NotNegative
    epochs: Natural
    batch_size: Count
    learning_rate: Positive
    schedule: choice("cosine", "constant")
    polish_steps: Natural
    device: Device
    seed: Seed


class HessianNorms(Parameters):
    """Notebook 03; `sizes` beyond `n_pool` - 1 are left out."""

    run: Name
    n_per_sample: AtLeastTwo
    n_certified: Count
    n_pyhessian: Count
    n_pool: whole_from(4)
    sizes: Sizes
    n_repeats: AtLeastTwo
    n_blocks: Count
    probes: whole_from(6)
    steps: AtLeastTwo
    confidence: Fraction
    device: Device
    seed: Seed


class BoundComparison(Parameters):
    """Notebook 04."""

    run: Name
    rungs: choices(*RUNGS)
    n_bounds: Count
    n_dense: Count
    sweeps: choices("depth", "width", "heads", "tokens", "scale", empty=True)
    confidence: Fraction
    device: Device
    seed: Seed


class SurfaceConvergence(Parameters):
    """Notebook 05; `radii` and `retrain_radius` are fractions of |w0|, `n_steps` counts the pairs
    (k, order) examined on the ball; without `retrain_sizes` nothing is trained."""

    run: Name
    n_orders: AtLeastTwo
    batch: AtLeastTwo
    radii: Positives
    n_steps: Count
    n_ascent: Count
    n_eigenvectors: AtLeastTwo
    n_weights: AtLeastTwo
    n_signs: AtLeastTwo
    retrain_sizes: SizesOrNone
    retrain_radius: Positive
    n_inits: Count
    plane_points: AtLeastTwo
    device: Device
    seed: Seed


class SampleSize(Parameters):
    """Notebook 06; `radius` and `ball` are fractions of |w0|."""

    run: Name
    tolerances: Positives
    radius: NotNegative
    ball: NotNegative
    confidence: Fraction
    kurtosis: described(Real, "a number greater than 1", gt=1)
    n_probes: Count
    n_orders: AtLeastTwo
    device: Device
    seed: Seed


class StudyReport(Parameters):
    """Notebook 07; without `runs` it reads the committed tables of the study."""

    study: Name
    runs: Names


MODELS: dict[str, type[Parameters]] = {
    "01": DataPreparation,
    "02": ModelTraining,
    "03": HessianNorms,
    "04": BoundComparison,
    "05": SurfaceConvergence,
    "06": SampleSize,
    "07": StudyReport,
}


def check(model: type[Parameters], values: dict[str, Any]) -> Parameters:
    """`values` as an instance of `model`, text that stands for a number or a list read as such.

    model   one of `MODELS`
    values  a value for each of its fields and nothing else

    Raises ValueError with one sentence.

    >>> check(StudyReport, {"study": "quickstart", "runs": "[a, b]"}).runs
    ['a', 'b']
    >>> check(StudyReport, {"study": "quickstart", "runs": [], "seeed": 1})
    Traceback (most recent call last):
    ValueError: unknown parameter seeed: choose from study, runs.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise ValueError(_sentence(error, model, values)) from None


def _sentence(error: ValidationError, model: type[Parameters], values: dict[str, Any]) -> str:
    """The first thing wrong, in one sentence: unknown names come before wrong values."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    if not first["loc"]:  # a rule between fields
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return unknown(name, list(model.model_fields))
    words = model.model_fields[name].description
    if first["type"] == "missing":
        return f"parameter {name} is missing: set it in the parameters cell to {words}."
    return f"parameter {name} is {short(values[name])}: give {words}."


def unknown(name: str, known: list[str]) -> str:
    """The sentence on a name that no parameter has: the nearest of the `known` names, or all.

    >>> unknown("depht", ["depth", "seed"])
    'unknown parameter depht: did you mean depth?'
    """
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
    return f"unknown parameter {name}: {advice}"


def short(value: Any) -> str:
    """A value as it is written in Python, on one line, cut after 60 characters.

    >>> short([1, 2])
    '[1, 2]'
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def validate(
    model: type[Parameters], namespace: dict[str, Any], dtype: str = "float64"
) -> Parameters:
    """Check a notebook's parameters and print what it runs with: `validate(Model, globals())`.

    Papermill only warns about a name that the notebook does not know, so the cells run so far
    (`In`) are read: the latest parameters cell and the latest injected one may set nothing but the
    model's fields.

    model      the notebook's model
    namespace  its `globals()`
    dtype      precision that is printed

    Raises ValueError with one sentence.

    >>> p = validate(StudyReport, {"study": "quickstart", "runs": []})  # doctest: +ELLIPSIS
    study                'quickstart'
    runs                 []
    python 3...
    device cpu, dtype float64, seed none
    """
    fields = list(model.model_fields)
    cells = [cell for cell in namespace.get("In", []) if assigned(cell, fields)]
    injected = [cell for cell in cells if cell.lstrip().startswith(INJECTED)]
    written = [cell for cell in cells if cell not in injected]
    for cell in written[-1:] + injected[-1:]:
        for name in assigned(cell, fields):
            if name not in fields:
                raise ValueError(unknown(name, fields))
    p = check(model, {name: namespace[name] for name in fields if name in namespace})
    for name, value in p.model_dump().items():
        print(f"{name:<21}{value!r}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"device {getattr(p, 'device', 'cpu')}, dtype {dtype}, seed {getattr(p, 'seed', 'none')}")
    return p


def assigned(cell: str, fields: list[str]) -> list[str]:
    """Names that a parameters cell sets: annotated literals, or whatever papermill injected.

    A scratch cell of an interactive session is neither: it has no annotations, or no parameter's
    name in it, and sets nothing.

    cell    source code
    fields  the parameters of the notebook

    >>> assigned("depth: int = 3", ["depth"]), assigned("depth = 3", ["depth"])
    (['depth'], [])
    """
    try:
        body = ast.parse(cell).body
    except SyntaxError:
        return []
    if cell.lstrip().startswith(INJECTED):
        targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
        return [t.id for t in targets if isinstance(t, ast.Name)]
    if not all(isinstance(s, ast.AnnAssign) and is_literal(s.value) for s in body):
        return []
    names = [ast.unparse(s.target) for s in body if isinstance(s, ast.AnnAssign)]
    return names if set(names) & set(fields) else []


def is_literal(node: ast.expr | None) -> bool:
    """Whether a node of a syntax tree is there and is a plain value: a number, text, a list.

    >>> is_literal(ast.parse("[1, 2]", mode="eval").body)
    True
    """
    if node is None:
        return False
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


def versions(device: str = "cpu") -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on.

    device  as PyTorch names it; the name of the GPU is added where it is one

    >>> list(versions())
    ['python', 'torch', 'numpy', 'scipy', 'pandas', 'scikit-learn']
    """
    found = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in LIBRARIES}
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found
