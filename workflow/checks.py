"""The rules for committed notebooks: their anatomy, and what GitHub can show of them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from utils.run.parameters import MODELS, is_literal
from workflow.execution import code_cells, read

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ABSOLUTE = re.compile(r"(?<![\w.:/*~<])(/(?:[\w.-]+/)+[\w.-]+|[A-Z]:\\[\w.\\]+)")
ACTIVE = ("application/vnd.jupyter.widget", "application/javascript")
HEADING = re.compile(r"^#{1,6}\s.*\$", re.MULTILINE)
TABLE_MATH = re.compile(r"\$[^$\n]*\|[^$\n]*\$")
MAGIC = re.compile(r"^\s*[!%]", re.MULTILINE)
MOST_BYTES = 1_000_000
MOST_LINES = 25
KINDS = ("int", "float", "str", "bool", "list")


def problems(path: Path | str) -> list[str]:
    """Breaches of the rules by one committed notebook, a sentence each.

    path: the notebook, whose name begins with its number.
    """
    path = Path(path)
    notebook = read(path)
    code = code_cells(notebook)
    said = _parameter_problems(path, code) + _prose_problems(path, notebook.cells)
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)) and any(count is not None for count in counts):
        said.append(f"execution counts are {counts}: merge a fresh run or clear all outputs.")
    if "widgets" in notebook.metadata:
        said.append("metadata.widgets is there: remove it.")
    size = path.stat().st_size
    if size >= MOST_BYTES:
        said.append(f"the file has {size} bytes: keep it under 1 MB.")
    for cell in code:
        said += [f"code cell {cell.id} {problem}" for problem in _code_problems(cell)]
    return said


def _code_problems(cell: NotebookNode) -> list[str]:
    said = []
    if len(cell.source.splitlines()) > MOST_LINES:
        said.append(f"has more than {MOST_LINES} lines: move some to utils/.")
    if MAGIC.search(cell.source):
        said.append("uses a magic or a shell command: write Python.")
    for output in cell.outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            said.append("carries an error or standard error: run it again.")
        if any(key.startswith(ACTIVE) for key in output.get("data", {})):
            said.append("shows a widget or JavaScript: print plain text.")
    texts = [text for output in cell.outputs for text in _texts(output)]
    shown = cell.source + json.dumps(texts, ensure_ascii=False)
    if match := ABSOLUTE.search(shown):
        said.append(f"shows the absolute path {match[1]}: make it relative.")
    return said


def _texts(output: NotebookNode) -> list[Any]:
    data = output.get("data", {})
    return [output.get("text", ""), *(v for k, v in data.items() if not k.startswith("image/"))]


def _parameter_problems(path: Path, code: list[NotebookNode]) -> list[str]:
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if not code or tagged != code[:1]:
        return ["the first code cell, and only it, has to be tagged `parameters`."]
    lines = code[0].source.splitlines()
    said = []
    names = []
    for statement in ast.parse(code[0].source).body:
        annotated = isinstance(statement, ast.AnnAssign)
        name = ast.unparse(statement.target if annotated else statement)
        said += [f"parameters cell: {p}" for p in _statement_problems(statement, name)]
        rest = lines[(statement.end_lineno or 1) - 1][statement.end_col_offset :]
        if "#" not in rest:
            said.append(f"parameters cell: `{name}` has no trailing comment.")
        names.append(name)
    fields = list(MODELS[path.name[:2]].model_fields)
    if names != fields:
        said.append(
            f"parameters cell sets {names}, utils/run/parameters.py has {fields}: make them agree."
        )
    return said


def _statement_problems(statement: ast.stmt, name: str) -> list[str]:
    plain = f"`{name}` is not a literal annotated {', '.join(KINDS[:-1])} or {KINDS[-1]}."
    if not isinstance(statement, ast.AnnAssign) or statement.value is None:
        return [plain]
    kind = ast.unparse(statement.annotation)
    if kind not in KINDS or not is_literal(statement.value):
        return [plain]
    if type(ast.literal_eval(statement.value)).__name__ != kind:
        return [f"the default of `{name}` is not of type {kind}."]
    return []


def _prose_problems(path: Path, cells: list[NotebookNode]) -> list[str]:
    said = []
    n_code = 0
    before = ""
    for cell in cells:
        if cell.cell_type == "code" and cell.source.strip():
            n_code += 1
            if n_code > 2 and before != "markdown":
                said.append(f"code cell {cell.id} has no sentence before it.")
        if cell.cell_type == "markdown":
            said += _text_problems(path, cell.source)
        before = cell.cell_type
    return said


def _text_problems(path: Path, text: str) -> list[str]:
    said = []
    if HEADING.search(text):
        said.append("a heading holds math, which GitHub does not show: write it in words.")
    tables = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    if any(TABLE_MATH.search(line) for line in tables):
        said.append("math in a table holds `|`: write \\lvert or \\Vert.")
    if match := ABSOLUTE.search(text):
        said.append(f"prose shows the absolute path {match[1]}: make it relative.")
    for link in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", link) and not _leads_somewhere(path, link):
            said.append(f"the link {link} does not lead anywhere.")
    return said


def _leads_somewhere(path: Path, link: str) -> bool:
    return not link.startswith("/") and (path.parent / link.split("#")[0]).exists()
