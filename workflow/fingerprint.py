"""What a notebook's results depend on: its code, and every module of utils that it imports."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from workflow.execution import code_cells, read

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_hash(notebook: Path | str, root: Path | str = ".") -> str:
    """SHA-256 of the code cells and of every `utils` module they import, directly or not.

    Comments, docstrings, formatting, prose and outputs do not count; the parameters cell does.

    notebook: its path; root: the folder that holds `utils`.

    Raises ValueError where the code does not parse.
    """
    try:
        source = "\n".join(cell.source for cell in code_cells(read(notebook)))
        trees = {"": ast.parse(source)}
        todo = imports(trees[""], "")
        while todo:
            name = todo.pop()
            path = _module(Path(root), name)
            if name not in trees and path is not None:
                trees[name] = ast.parse(path.read_text(encoding="utf-8"))
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                todo |= imports(trees[name], package)
    except SyntaxError as error:
        raise ValueError(
            f"{notebook} or a module it imports does not parse ({error}): correct it."
        ) from None
    text = "\n".join(f"{name}\n{ast.dump(_bare(tree))}" for name, tree in sorted(trees.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def imports(tree: ast.Module, package: str) -> set[str]:
    """Dotted names below `utils` that code imports, with their packages; some are no modules.

    tree: the code; package: that of the module it comes from, for relative imports.

    >>> sorted(imports(ast.parse("from utils.run.files import atomic"), ""))
    ['utils', 'utils.run', 'utils.run.files', 'utils.run.files.atomic']
    >>> sorted(imports(ast.parse("from . import files"), "utils.run"))
    ['utils', 'utils.run', 'utils.run.files']
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    ours = [name.split(".") for name in names if name.split(".")[0] == "utils"]
    return {".".join(parts[:k]) for parts in ours for k in range(1, len(parts) + 1)}


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1]
    return ".".join(above + ([node.module] if node.module else []))


def _module(root: Path, name: str) -> Path | None:
    """The file of a dotted name, None where it is no module."""
    path = root.joinpath(*name.split("."))
    for candidate in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if candidate.is_file():
            return candidate
    return None


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings; comments are not in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree
