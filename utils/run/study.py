"""Study files: YAML that says which runs make up a study, with what parameters."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from utils.run.parameters import MODELS, StudyReport, check, short, unknown

FORM = "give `name:` and `runs:`, a list of {run: NAME, parameters: {NAME: VALUE}}"
Values = dict[str, Any]
ByStage = dict[str, Values]
STAGES_OF_A_RUN = [stage for stage in MODELS if stage != "07"]


class RunEntry(BaseModel):
    """One run of a study file, its name and parameters still as they were read."""

    model_config = ConfigDict(extra="forbid")
    run: Any
    parameters: dict[Any, Any] | None = None


class StudyFile(BaseModel):
    """What a study file holds."""

    model_config = ConfigDict(extra="forbid")
    name: Any
    runs: list[RunEntry]


@dataclass(frozen=True)
class Study:
    """A study: its runs in order, and per run and notebook ("01" to "06") all its parameters."""

    name: str
    runs: list[str]
    parameters: dict[str, ByStage]

    @property
    def report(self) -> Values:
        """The parameters of notebook 07."""
        return {"study": self.name, "runs": self.runs}


def read_study(path: Path | str, notebooks: Path | str = "notebooks") -> Study:
    """Read and check a study file: `name:`, as the file is called, and `runs:`, each with its
    parameters. A parameter goes to every notebook that has it; what is not set stays as in the
    parameters cells.

    path       the YAML file
    notebooks  folder of the notebooks 01 to 06

    Raises ValueError with one sentence.

    >>> read_study("studies/quickstart.yaml").runs
    ['quickstart']
    """
    path = Path(path)
    content = _content(path)
    if not content.runs:
        raise ValueError(f"{path} has no runs: {FORM}.")
    resolved = _resolved(path, content.runs, Path(notebooks))
    try:
        check(StudyReport, {"study": content.name, "runs": list(resolved)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}".replace("parameter study", "name")) from None
    if content.name != path.stem and (_is_name(path.stem) or _is_taken(path, content.name)):
        raise ValueError(
            f"{path} says name: {content.name}, but its results go by the file's name: "
            f"write name: {path.stem}."
        )
    return Study(content.name, list(resolved), resolved)


def _is_name(text: str) -> bool:
    """Whether a study can have that name; results of a file without such a name go by `name:`."""
    try:
        check(StudyReport, {"study": text, "runs": []})
    except ValueError:
        return False
    return True


def _is_taken(path: Path, name: str) -> bool:
    """Whether another study, beside `path` or of this repository, has that name."""
    return any((folder / f"{name}.yaml").is_file() for folder in (path.parent, Path("studies")))


class _Loader(yaml.SafeLoader):
    """YAML of which no key may be given twice, what `<<` merges aside."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"{short(twice[0])} is given twice")
        return super().construct_mapping(node, deep)


def _content(path: Path) -> StudyFile:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file: give a study file of studies/*.yaml.")
    try:
        content = yaml.load(path.read_text(), _Loader)  # a safe one
    except FileNotFoundError:
        raise ValueError(f"there is no study file {path}: give one of studies/*.yaml.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable YAML file ({reason}): correct it.") from None
    try:
        return StudyFile.model_validate(content)
    except ValidationError as error:
        raise ValueError(_sentence(path, content, error.errors()[0]["loc"])) from None


def _sentence(path: Path, content: Any, place: tuple[int | str, ...]) -> str:
    """What is wrong at a place of a study file that is not one."""
    if len(place) < 2:
        return f"{path} is not a study: {FORM}."
    entry = content["runs"][place[1]]
    if place[2:3] == ("parameters",):
        run = short(entry.get("run"))
        return f"{path}, run {run}: the parameters are not a mapping: {FORM}."
    return f"{path} holds the run {short(entry)}: {FORM}."


def _resolved(path: Path, entries: list[RunEntry], notebooks: Path) -> dict[str, ByStage]:
    """Per run and stage the parameters, those that the study sets in place of the defaults."""
    by_stage = {stage: defaults(notebook_of(stage, notebooks)) for stage in STAGES_OF_A_RUN}
    names = {name for stage in STAGES_OF_A_RUN for name in MODELS[stage].model_fields}
    known = sorted(names - {"run"})
    resolved: dict[str, ByStage] = {}
    for entry in entries:
        label = f"{path}, run {short(entry.run)}"
        wanted = entry.parameters or {}
        for name in wanted:
            if name not in known:
                raise ValueError(f"{label}: {unknown(str(name), known)}")
        given = {"run": entry.run} | wanted
        try:
            stages = {stage: _of_stage(stage, by_stage[stage], given) for stage in by_stage}
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        if entry.run in resolved:
            raise ValueError(
                f"{path} has two runs named {short(entry.run)}: give each its own name."
            )
        resolved[entry.run] = stages
    return resolved


def _of_stage(stage: str, values: Values, given: Values) -> Values:
    model = MODELS[stage]
    own = {name: value for name, value in given.items() if name in model.model_fields}
    return check(model, values | own).model_dump()


def notebook_of(stage: str, folder: Path) -> Path:
    """The one notebook of a stage ("01" to "07") in a folder.

    Raises ValueError where there is none, or several.
    """
    found = sorted(folder.glob(f"{stage}_*.ipynb"))
    if len(found) != 1:
        raise ValueError(
            f"{folder} has {len(found)} notebooks {stage}_*.ipynb: "
            "run this from the project's root."
        )
    return found[0]


def defaults(notebook: Path | str) -> Values:
    """The literals of a notebook's parameters cell (its first code cell), by name."""
    cells = nbformat.read(notebook, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    return {
        ast.unparse(s.target): ast.literal_eval(s.value)
        for s in ast.parse(first.source).body
        if isinstance(s, ast.AnnAssign) and s.value is not None
    }
