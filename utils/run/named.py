"""Files that a user's parameters name: recorded with their content, and watched from then on."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.run.files import sha256


def named_files(values: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that the parameters of a notebook name, by its path as it is named.

    values  of parameters by name, of which count: dataset "npz:PATH"; model "PATH.py:function",
            with every module beside it that it imports; weights

    Files that are not there are left out: who needs them says so.

    >>> named_files({"dataset": "digits", "model": "vit", "weights": ""})
    {}
    """
    paths: list[Path] = []
    dataset, model, weights = (
        str(values.get(name, "")) for name in ("dataset", "model", "weights")
    )
    if dataset.startswith("npz:"):
        paths.append(Path(dataset.removeprefix("npz:")))
    if ".py:" in model:
        paths += modules_of(Path(model.rpartition(":")[0]))
    if weights:
        paths.append(Path(weights))
    return {str(p): sha256(p.expanduser()) for p in paths if p.expanduser().is_file()}


def modules_of(file: Path) -> list[Path]:
    """A Python file and the modules that it imports from its own folder, directly or not.

    >>> modules_of(Path("nowhere.py"))
    [PosixPath('nowhere.py')]
    """
    folder = file.parent
    found = [file]
    for path in found:  # grows while it is walked
        if path.is_file():
            imported = {m for name in _imports(path, folder) for m in _files(folder, name)}
            found += sorted(imported.difference(found))
    return found


def _imports(path: Path, folder: Path) -> Iterator[str]:
    """Dotted names that a file of `folder` imports; none where it does not parse."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    package = list(path.parent.relative_to(folder).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def _files(folder: Path, name: str) -> Iterator[Path]:
    """The files below `folder` that importing the dotted `name` executes."""
    parts = [part for part in name.split(".") if part]
    for k in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:k])
        for candidate in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if candidate.is_file():
                yield candidate
