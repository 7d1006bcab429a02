"""What each notebook may be told: one model per notebook, with types and ranges, and the study files.

Defaults stand only in a notebook's parameters cell. A wrong name, type or range raises `ValueError` with one
sentence that says what is wrong and what to do; nothing heavy is imported before that.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "scikit-learn")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _name(value: str) -> str:
    if not NAME.fullmatch(value) or ".." in value:
        raise ValueError("not a plain name")  # the sentence comes from the field's description
    return value


def _increasing(values: list[int]) -> list[int]:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError("not increasing")
    return values


def _distinct(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError("repeated")
    return values


def _says(kind, description: str, *checks, **limits):
    """A type with its limits and the words that an error message uses for them."""
    return Annotated[kind, Field(description=description, **limits), *checks]


_NAME_WORDS = "letters, digits, '.', '_' or '-' (at most 64, beginning with a letter or digit, no '..')"
Name = _says(str, f"a name, as text, of {_NAME_WORDS}", AfterValidator(_name))
Text = _says(str, "text in quotes")
NonEmpty = _says(str, "text that is not empty", min_length=1)
Seed = _says(int, "an integer from 0 to 4294967295", ge=0, le=2**32 - 1)
Natural = _says(int, "an integer of at least 0", ge=0)
Count = _says(int, "an integer of at least 1", ge=1)
AtLeastTwo = _says(int, "an integer of at least 2", ge=2)
Fraction = _says(float, "a number between 0 and 1, both excluded", gt=0, lt=1)
Positive = _says(float, "a number greater than 0", gt=0)
NotNegative = _says(float, "a number of at least 0", ge=0)
Positives = _says(list[Annotated[float, Field(gt=0)]], "a list of one or more numbers greater than 0", min_length=1)
Sizes = _says(
    list[Annotated[int, Field(ge=1)]],
    "a strictly increasing list of one or more integers of at least 1",
    AfterValidator(_increasing),
    min_length=1,
)
SizesOrNone = _says(
    list[Annotated[int, Field(ge=2)]],
    "a strictly increasing list of integers of at least 2, or an empty one",
    AfterValidator(_increasing),
)


def _choice(*names: str):
    return Annotated[Literal[names], Field(description="one of " + ", ".join(names))]


Device = _choice("cpu", "cuda")


class Parameters(BaseModel):
    """Base of the models below: every field required, nothing else allowed, instances frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _read_strings(cls, values: dict) -> dict:
        """Refuse True where a number is asked for (Python takes it for 1); read a list that came as text."""
        values = dict(values)
        for name, field in cls.model_fields.items():
            value, is_list = values.get(name), get_origin(field.annotation) is list
            if is_list and isinstance(value, str) and value.lstrip().startswith("["):
                try:
                    value = values[name] = yaml.safe_load(value)
                except yaml.YAMLError:
                    continue  # stays text, which no list field takes
            items = value if is_list and isinstance(value, list) else [value]
            if field.annotation is not bool and any(isinstance(item, bool) for item in items):
                values[name] = _Unreadable(value)
        return values


class _Unreadable:
    """Stands for a value that no field takes, and looks like it in the message."""

    def __init__(self, value):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


class DataPreparation(Parameters):
    """Notebook 01."""

    run: Name
    dataset: NonEmpty
    data_root: Text
    n_samples: Natural
    calibration_fraction: Fraction
    test_fraction: Fraction
    order: _choice("random", "published")
    seed: Seed

    @model_validator(mode="after")
    def _leaves_training_samples(self):
        if self.calibration_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"calibration_fraction {self.calibration_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on: choose them with a sum below 1."
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
    norm: _choice("pre", "post")
    activation: _choice("gelu", "gelu_tanh", "relu")
    pool: _choice("cls", "mean")
    eps: Positive
    loss: _choice("cross_entropy", "mse")
    l2: NotNegative
    epochs: Natural
    batch_size: Count
    learning_rate: Positive
    schedule: _choice("cosine", "constant")
    polish_steps: Natural
    device: Device
    seed: Seed


class HessianNorms(Parameters):
    """Notebook 03; `sizes` beyond `n_pool` - 1 are left out."""

    run: Name
    n_per_sample: AtLeastTwo
    n_certified: Count
    n_pyhessian: Count
    n_pool: _says(int, "an integer of at least 4", ge=4)
    sizes: Sizes
    n_repeats: AtLeastTwo
    n_blocks: Count
    probes: _says(int, "an integer of at least 6", ge=6)
    steps: AtLeastTwo
    confidence: Fraction
    device: Device
    seed: Seed


class BoundComparison(Parameters):
    """Notebook 04."""

    run: Name
    rungs: _says(
        list[Literal["closed_form", "prior", "activations", "adjoint", "blocks", "tangents", "majorant", "deflated"]],
        "a list of different names out of closed_form, prior, activations, adjoint, blocks, tangents, majorant, "
        "deflated",
        AfterValidator(_distinct),
        min_length=1,
    )
    n_bounds: Count
    n_dense: Count
    products: Count
    sweeps: _says(
        list[Literal["depth", "width", "heads", "tokens", "scale"]],
        "a list of different names out of depth, width, heads, tokens, scale, or an empty one",
        AfterValidator(_distinct),
    )
    confidence: Fraction
    device: Device
    seed: Seed


class SurfaceConvergence(Parameters):
    """Notebook 05; `radii` and `retrain_radius` are fractions of |w0|, `n_steps` counts the pairs (k, order) examined
    on the ball; without `retrain_sizes` nothing is trained."""

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
    kurtosis: _says(float, "a number greater than 1", gt=1)
    n_probes: Count
    n_orders: AtLeastTwo
    device: Device
    seed: Seed


class StudyReport(Parameters):
    """Notebook 07; without `runs` it reads the committed tables of the study."""

    study: Name
    runs: _says(
        list[Annotated[str, AfterValidator(_name)]],
        f"a list of different run names, each of {_NAME_WORDS}, or an empty one",
        AfterValidator(_distinct),
    )


MODELS: dict[str, type[Parameters]] = {
    "01": DataPreparation,
    "02": ModelTraining,
    "03": HessianNorms,
    "04": BoundComparison,
    "05": SurfaceConvergence,
    "06": SampleSize,
    "07": StudyReport,
}


# --- checking ------------------------------------------------------------------------------------


def _short(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
    return f"unknown parameter {name}: {advice}"


def _sentence(error: ValidationError, model: type[Parameters], values: dict) -> str:
    """The first thing wrong, in one sentence: unknown names come before wrong values."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first, where = problems[0], problems[0]["loc"]
    if not where:  # a rule between fields
        return str(first["ctx"]["error"])
    name = str(where[0])
    if first["type"] == "extra_forbidden":
        return _unknown(name, list(model.model_fields))
    words = model.model_fields[name].description
    if first["type"] == "missing":
        return f"parameter {name} is missing: set it in the parameters cell to {words}."
    return f"parameter {name} is {_short(values[name])}: give {words}."


def check(model: type[Parameters], values: dict) -> Parameters:
    """`values` as an instance of `model`. Raises ValueError with one sentence."""
    try:
        return model(**values)
    except ValidationError as error:
        raise ValueError(_sentence(error, model, values)) from None


def _assigned(cell: str, fields) -> list[str]:
    """Names that a parameters cell sets: annotated literals, or whatever papermill injected; else nothing.

    A scratch cell of an interactive session is neither: it has no annotations, or no parameter's name in it.
    """
    try:
        body = ast.parse(cell).body
    except SyntaxError:
        return []
    if cell.lstrip().startswith("# Parameters"):
        return [t.id for s in body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)]
    if not all(isinstance(s, ast.AnnAssign) and _is_literal(s.value) for s in body):
        return []
    names = [ast.unparse(s.target) for s in body]
    return names if set(names) & set(fields) else []


def _is_literal(node) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


def validate(model: type[Parameters], namespace: dict, dtype: str = "float64") -> Parameters:
    """Check a notebook's parameters and print what it runs with; called as `validate(Model, globals())`.

    Papermill only warns about a name that the notebook does not know, so the cells run so far (`In`) are read:
    the latest parameters cell and the latest injected one may set nothing but the model's fields.
    Raises ValueError with one sentence.
    """
    fields = list(model.model_fields)
    cells = [cell for cell in namespace.get("In", []) if _assigned(cell, fields)]
    injected = [cell for cell in cells if cell.lstrip().startswith("# Parameters")]
    written = [cell for cell in cells if cell not in injected]
    for cell in written[-1:] + injected[-1:]:
        for name in _assigned(cell, fields):
            if name not in fields:
                raise ValueError(_unknown(name, fields))
    p = check(model, {name: namespace[name] for name in fields if name in namespace})
    for name, value in p.model_dump().items():
        print(f"{name:<21}{value!r}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"device {getattr(p, 'device', 'cpu')}, dtype {dtype}, seed {getattr(p, 'seed', 'none')}")
    return p


def versions(device: str = "cpu") -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on; the name of the GPU where one is used."""
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


# --- the notebooks' defaults and the studies -----------------------------------------------------


def defaults(notebook: Path | str) -> dict:
    """The literals of the notebook's parameters cell (its first code cell), by name."""
    cells = json.loads(Path(notebook).read_text())["cells"]
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    return {
        ast.unparse(s.target): ast.literal_eval(s.value)
        for s in ast.parse("".join(first["source"])).body
        if isinstance(s, ast.AnnAssign)
    }


@dataclass(frozen=True)
class Study:
    """A study: its runs in order, and per run and notebook ("01" to "06") the parameters, all resolved."""

    name: str
    runs: list[str]
    parameters: dict[str, dict[str, dict]]

    @property
    def report(self) -> dict:
        """The parameters of notebook 07."""
        return {"study": self.name, "runs": self.runs}


def read_study(path: Path | str, notebooks: Path | str = "notebooks") -> Study:
    """Read and check a study file: `name:` and `runs:`, a list of `{run: NAME, parameters: {NAME: VALUE}}`.

    A parameter goes to every notebook that has it; what is not set stays as in the parameters cells.
    Raises ValueError with one sentence.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no study file {path}: give one of studies/*.yaml.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable YAML file ({' '.join(str(error).split())}): correct it.") from None
    form = "give `name:` and `runs:`, a list of {run: NAME, parameters: {NAME: VALUE}}"
    if not isinstance(content, dict) or set(content) != {"name", "runs"} or not isinstance(content["runs"], list):
        raise ValueError(f"{path} is not a study: {form}.")
    by_stage = {s: defaults(_notebook(s, notebooks)) for s in MODELS if s != "07"}
    known = sorted({name for model in list(MODELS.values())[:-1] for name in model.model_fields} - {"run"})
    resolved = {}
    for entry in content["runs"]:
        if not isinstance(entry, dict) or "run" not in entry or not set(entry) <= {"run", "parameters"}:
            raise ValueError(f"{path} holds the run {_short(entry)}: {form}.")
        run, wanted = entry["run"], entry.get("parameters") or {}
        if not isinstance(wanted, dict):
            raise ValueError(f"{path}, run {_short(run)}: the parameters are not a mapping: {form}.")
        for name in wanted:
            if name not in known:
                raise ValueError(f"{path}, run {_short(run)}: {_unknown(str(name), known)}")
        if run in resolved:
            raise ValueError(f"{path} has two runs named {_short(run)}: give each its own name.")
        try:
            resolved[str(run)] = {s: _resolve(s, values, {"run": run} | wanted) for s, values in by_stage.items()}
        except ValueError as error:
            raise ValueError(f"{path}, run {_short(run)}: {error}") from None
    if not resolved:
        raise ValueError(f"{path} has no runs: {form}.")
    try:
        check(StudyReport, {"study": content["name"], "runs": list(resolved)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}".replace("parameter study", "name")) from None
    return Study(content["name"], list(resolved), resolved)


def _notebook(stage: str, folder: Path | str) -> Path:
    found = sorted(Path(folder).glob(f"{stage}_*.ipynb"))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} notebooks {stage}_*.ipynb: run this from the project's root.")
    return found[0]


def _resolve(stage: str, values: dict, wanted: dict) -> dict:
    model = MODELS[stage]
    return check(model, values | {k: v for k, v in wanted.items() if k in model.model_fields}).model_dump()
