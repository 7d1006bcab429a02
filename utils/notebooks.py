"""Executed notebooks: what they depend on, how their outputs come back, and the rules for committed ones.

    python -m utils.notebooks normalise IN OUT      an executed copy without run-to-run noise
    python -m utils.notebooks merge STUDY.yaml      outputs of a study's first run into notebooks/, findings into README
    python -m utils.notebooks dictionary            the columns of the result files into data/README.md
    python -m utils.notebooks render STUDY.yaml     a study's first run, executed, into notebooks/rendered/
    python -m utils.notebooks html FOLDER           every notebook as a page, with an index
    python -m utils.notebooks progress              from Snakemake's output, with a rate and a remaining time
    python -m utils.notebooks check                 the rules, one line for each breach

Executed copies lie at data/runs/<run>/notebooks/, notebook 07's at data/runs/_study_<study>/notebooks/.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from utils import params, runs

NOTEBOOKS = Path("notebooks")
NAMES = {
    "01": "01_data_preparation",
    "02": "02_model_training",
    "03": "03_hessian_norms",
    "04": "04_bound_comparison",
    "05": "05_surface_convergence",
    "06": "06_sample_size",
    "07": "07_study_report",
}
RECORDS = {"papermill", "execution"}  # metadata that two equal runs do not share


def read(path: Path | str) -> dict:
    """A notebook as it stands on disk. Raises ValueError where it is not one."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        notebook["cells"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a notebook: restore it with git checkout.") from None
    return notebook


def write(path: Path | str, notebook: dict) -> None:
    """Write as Jupyter does (indent 1, sorted keys), atomically."""
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False, separators=(",", ": "))
    with runs.atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def source(cell: dict) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    """The code cells that hold something."""
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and source(c).strip()]


# --- what a notebook depends on ------------------------------------------------------------------


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings; comments are not in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.body and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return tree


def _imports(tree: ast.Module) -> set[str]:
    """Names of the `utils` modules that the code imports, as dotted names; some of them may be no modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "utils"}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # only inside utils/
                module = f"utils.{module}".rstrip(".")
            if module.split(".")[0] == "utils":
                found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return found


def code_hash(notebook: Path | str, root: Path | str = ".") -> str:
    """SHA-256 of the code cells and of every `utils` module they import, directly or not.

    Comments, docstrings, formatting, prose and outputs do not count; the parameters cell does.
    Raises ValueError where the code does not parse.
    """
    try:
        trees = {"": ast.parse("\n".join(source(c) for c in code_cells(read(notebook))))}
        todo = _imports(trees[""])
        while todo:
            name = todo.pop()
            path = Path(root, *name.split(".")).with_suffix(".py")
            if name == "utils":
                path = Path(root, "utils", "__init__.py")
            if name not in trees and path.is_file():
                trees[name] = ast.parse(path.read_text(encoding="utf-8"))
                todo |= _imports(trees[name])
    except SyntaxError as error:
        raise ValueError(f"{notebook} or a module it imports does not parse ({error}): correct it.") from None
    text = "\n".join(f"{name}\n{ast.dump(_bare(tree))}" for name, tree in sorted(trees.items()))
    return hashlib.sha256(text.encode()).hexdigest()


# --- executed copies -----------------------------------------------------------------------------


def executed_path(stage: str, run: str) -> Path:
    """Where the executed copy of a notebook lies; for 07, `run` is the study's name."""
    return runs.RUNS / (f"_study_{run}" if stage == "07" else run) / "notebooks" / f"{NAMES[stage]}.ipynb"


def normalise(executed: Path | str, target: Path | str) -> None:
    """An executed copy without what differs between two equal runs: ids of jobs, times, standard error, counts, and
    the pieces in which printed text arrived."""
    notebook = read(executed)
    notebook["cells"] = [c for c in notebook["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
    notebook["metadata"].get("language_info", {}).pop("version", None)
    for part in (notebook, *notebook["cells"]):
        part["metadata"] = {key: value for key, value in part["metadata"].items() if key not in RECORDS}
    for count, cell in enumerate(code_cells(notebook), 1):
        _put(cell, cell["outputs"], count)
    write(target, notebook)


def _put(cell: dict, outputs: list[dict], count: int) -> None:
    cell["outputs"], kept = [], [o for o in outputs if o.get("name") != "stderr"]
    for output in kept:  # a slow machine sends in two pieces what a fast one sends in one
        last = cell["outputs"][-1] if cell["outputs"] else {}
        if output["output_type"] == "stream":
            joined = output["output_type"] == last.get("output_type")
            text = "".join([*(cell["outputs"].pop()["text"] if joined else ""), *output["text"]])
            output = output | {"text": text.splitlines(keepends=True)}
        cell["outputs"].append(output)
    cell["execution_count"] = count
    for output in cell["outputs"]:
        if "execution_count" in output:
            output["execution_count"] = count


def _code(cell: dict) -> str:
    """A cell's code without comments and layout; its text where it does not parse."""
    try:
        return ast.dump(ast.parse(source(cell)))
    except SyntaxError:
        return source(cell)


def merge_outputs(template: Path | str, executed: Path | str) -> list[str]:
    """Bring an executed copy's outputs into the template: by cell id, where the code is the same.

    Returns the ids of code cells that were left alone. Everything else in the template stays as it is.
    """
    notebook, done = read(template), {c.get("id"): c for c in code_cells(read(executed))}
    left = []
    for count, cell in enumerate(code_cells(notebook), 1):
        twin = done.get(cell.get("id"))
        if twin is None or _code(twin) != _code(cell):
            left.append(cell.get("id", "?"))
            if cell.get("execution_count") is not None:
                _put(cell, cell["outputs"], count)
        else:
            _put(cell, twin["outputs"], count)
    write(template, notebook)
    return left


def merge_study(path: Path | str) -> None:
    """Merge the outputs of the study's first run, and of its report, into notebooks/.

    Raises ValueError where a run was last made with other parameters than the study's (by hand, say).
    """
    study = params.read_study(path, NOTEBOOKS)
    for run, stages in study.parameters.items():
        record = runs.record_of(run)
        for stage, wanted in stages.items():
            if record.get(stage, {}).get("parameters") != wanted:
                raise ValueError(
                    f"run {run!r} was last made by notebook {stage} with other parameters than {path} gives: "
                    f"delete {runs.RUNS / run} and repeat."
                )
    for stage, name in NAMES.items():
        executed = executed_path(stage, study.name if stage == "07" else study.runs[0])
        if not executed.is_file():
            raise ValueError(f"there is no executed copy {executed}: delete {executed.parents[1]} and repeat.")
        left = merge_outputs(NOTEBOOKS / f"{name}.ipynb", executed)
        if left:
            print(f"{name}: {len(left)} cells were edited meanwhile and keep their outputs.", file=sys.stderr)


def fill(page: Path | str, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page of Markdown."""
    before, rest = Path(page).read_text(encoding="utf-8").split(f"<!-- {name} -->")
    _, after = rest.split(f"<!-- /{name} -->")
    with runs.atomic(page) as temporary:
        whole = f"{before}<!-- {name} -->\n\n{text.strip()}\n\n<!-- /{name} -->{after}"
        temporary.write_text(whole, encoding="utf-8")


def findings_table(study: str) -> str:
    """A study's findings as a table of Markdown, numbers to four digits."""
    frame = runs.read_table(runs.RESULTS / study / "findings.csv").drop(columns=["source", "control"], errors="ignore")
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    rows = [["" if cell == "nan" else cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(study: params.Study) -> None:
    """Copies of the executed notebooks of the study's first run and of its report into notebooks/rendered/<run>/.

    Raises FileNotFoundError where one has not been executed; nothing is copied then.
    """
    run = study.runs[0]
    copies = {stage: executed_path(stage, study.name if stage == "07" else run) for stage in NAMES}
    for stage, path in copies.items():
        cells = [c for c in read(path)["cells"] if c["cell_type"] == "code"] if path.is_file() else []
        failed = any(o["output_type"] == "error" for c in cells for o in c["outputs"])
        if not cells or failed or not all(c["execution_count"] for c in cells):
            raise FileNotFoundError(f"run {run!r} has no executed notebook {stage}: run the study first.")
    for path in copies.values():
        write(NOTEBOOKS / "rendered" / run / path.name, read(path))


NOISE = re.compile(r"Select jobs to execute|Execute \d+ jobs|Finished jobid|\[\w{3} \w{3} +\d+ [\d:]+ \d{4}\]$")
STEPS = re.compile(r"(\d+) of (\d+) steps \(.*\) done")


def progress(lines, clock=time.monotonic) -> None:
    """Print Snakemake's lines as they come, those on finished steps with their rate and the time that remains."""
    start = clock()
    for line in lines:
        if found := STEPS.match(line):
            done, total, elapsed = int(found[1]), int(found[2]), clock() - start
            left = timedelta(seconds=round(elapsed / done * (total - done)))
            line = f"{done} of {total} notebooks, {60 * done / max(elapsed, 1e-9):.2g} a minute, {left} left\n"
        if line.strip() and not NOISE.match(line):
            print(line, end="", flush=True)


def dictionary() -> str:
    """The columns of every result file as Markdown, from `runs.SCHEMAS`."""
    parts = []
    for file, columns in runs.SCHEMAS.items():
        rows = [f"| `{c}` | {kind} | {meaning.replace('|', chr(92) + '|')} |" for c, (kind, meaning) in columns.items()]
        parts.append("\n".join([f"### {file}\n", "| column | type | meaning [unit] |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def last_error(path: Path | str) -> str:
    """The last line that a failed papermill printed: the sentence of the error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", Path(path).read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1]


# --- the rules for committed notebooks -----------------------------------------------------------

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ABSOLUTE = re.compile(r"(?<![\w.:/*~<])(/(?:[\w.-]+/)+[\w.-]+|[A-Z]:\\[\w.\\]+)")
ACTIVE = ("application/vnd.jupyter.widget", "application/javascript")
HEADING = re.compile(r"^#{1,6}\s.*\$", re.MULTILINE)
TABLE_MATH = re.compile(r"\$[^$\n]*\|[^$\n]*\$")
MAGIC = re.compile(r"^\s*[!%]", re.MULTILINE)


def problems(path: Path | str) -> list[str]:
    """Breaches of the rules by one committed notebook, a sentence each: its anatomy, and what GitHub can show."""
    path = Path(path)
    notebook = read(path)
    cells, code = notebook["cells"], code_cells(notebook)
    found = _parameter_problems(path, code) + _prose_problems(path, cells)
    counts = [c["execution_count"] for c in code]
    if counts != list(range(1, len(code) + 1)) and any(c is not None for c in counts):
        found.append(f"execution counts are {counts}: merge a fresh run or clear all outputs.")
    if "widgets" in notebook["metadata"]:
        found.append("metadata.widgets is there: remove it.")
    if path.stat().st_size >= 1_000_000:
        found.append(f"the file has {path.stat().st_size} bytes: keep it under 1 MB.")
    for cell in code:
        label = f"code cell {cell.get('id', '?')}"
        if len(source(cell).splitlines()) > 25:
            found.append(f"{label} has more than 25 lines: move some to utils/.")
        if MAGIC.search(source(cell)):
            found.append(f"{label} uses a magic or a shell command: write Python.")
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                found.append(f"{label} carries an error or standard error: run it again.")
            if any(key.startswith(ACTIVE) for key in output.get("data", {})):
                found.append(f"{label} shows a widget or JavaScript: print plain text.")
        shown = source(cell) + json.dumps([_texts(o) for o in cell["outputs"]], ensure_ascii=False)
        if match := ABSOLUTE.search(shown):
            found.append(f"{label} shows the absolute path {match[1]}: make it relative.")
    return found


def _texts(output: dict) -> list:
    data = output.get("data", {})
    return [output.get("text", ""), *(v for k, v in data.items() if not k.startswith("image/"))]


def _parameter_problems(path: Path, code: list[dict]) -> list[str]:
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    if not code or tagged != code[:1]:
        return ["the first code cell, and only it, has to be tagged `parameters`."]
    found, names, text = [], [], source(code[0])
    for statement in ast.parse(text).body:
        line = text.splitlines()[statement.end_lineno - 1]
        name = ast.unparse(statement.target) if isinstance(statement, ast.AnnAssign) else ast.unparse(statement)
        plain = isinstance(statement, ast.AnnAssign) and params._is_literal(statement.value)
        kind = ast.unparse(statement.annotation) if isinstance(statement, ast.AnnAssign) else ""
        if not plain or kind not in ("int", "float", "str", "bool", "list"):
            found.append(f"parameters cell: `{name}` is not a literal annotated int, float, str, bool or list.")
        elif type(ast.literal_eval(statement.value)).__name__ != kind:
            found.append(f"parameters cell: the default of `{name}` is not of type {kind}.")
        if "#" not in line[statement.end_col_offset :]:
            found.append(f"parameters cell: `{name}` has no trailing comment.")
        names.append(name)
    fields = list(params.MODELS[path.name[:2]].model_fields)
    if names != fields:
        found.append(f"parameters cell sets {names}, utils/params.py has {fields}: make them agree.")
    return found


def _prose_problems(path: Path, cells: list[dict]) -> list[str]:
    found, n_code = [], 0
    for before, cell in zip([None, *cells], cells, strict=False):
        text = source(cell)
        if cell["cell_type"] == "code" and text.strip():
            n_code += 1
            if n_code > 2 and (before is None or before["cell_type"] != "markdown"):
                found.append(f"code cell {cell.get('id', '?')} has no sentence before it.")
        if cell["cell_type"] != "markdown":
            continue
        if HEADING.search(text):
            found.append("a heading holds math, which GitHub does not show: write it in words.")
        if any(TABLE_MATH.search(line) for line in text.splitlines() if line.lstrip().startswith("|")):
            found.append("math in a table holds `|`: write \\lvert or \\Vert.")
        if match := ABSOLUTE.search(text):
            found.append(f"prose shows the absolute path {match[1]}: make it relative.")
        for link in LINK.findall(text):
            if not re.match(r"[a-z]+:", link) and not link.startswith("#"):
                if link.startswith("/") or not (path.parent / link.split("#")[0]).exists():
                    found.append(f"the link {link} does not lead anywhere.")
    return found


def html(folder: Path | str) -> Path:
    """Every notebook under notebooks/ as a page in the folder, with the outputs it has; returns the index.

    Links between notebooks lead to the pages; those to other files of the repository are kept as they are.
    """
    from nbconvert import HTMLExporter  # seconds to import

    folder, exporter, lists = Path(folder), HTMLExporter(), {}
    for path in sorted(NOTEBOOKS.rglob("*.ipynb"), key=lambda p: (len(p.parts), p)):
        if ".ipynb_checkpoints" in path.parts:
            continue
        page = folder / path.relative_to(NOTEBOOKS).with_suffix(".html")
        body, _ = exporter.from_filename(str(path))
        page.parent.mkdir(parents=True, exist_ok=True)
        with runs.atomic(page) as temporary:
            temporary.write_text(re.sub(r'href="([^":/]+)\.ipynb"', r'href="\1.html"', body), encoding="utf-8")
        head = source(read(path)["cells"][0])
        title, asks = re.search(r"^# (.+)$", head, re.MULTILINE), re.search(r"\*\*Question\.\*\* (.+)", head)
        title = title[1] if title else path.stem
        asks = re.sub(r"\$\\?(\w+)\$", r"\1", asks[1]) if asks else ""
        row = f'<li><a href="{page.relative_to(folder).as_posix()}">{title}</a> {asks}</li>'
        lists.setdefault("quickstart" if path.parent == NOTEBOOKS else path.parent.name, []).append(row)
        print(f"{page}", flush=True)
    style = "body{font:16px/1.5 sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem}li{margin:.6rem 0}"
    text = f'<!doctype html><meta charset="utf-8"><title>Notebooks</title><style>{style}</style>'
    text += "<h1>Convergence of the loss function surface in transformers</h1>"
    text += "".join(f"<h2>{run}</h2><ul>{''.join(rows)}</ul>" for run, rows in lists.items())
    with runs.atomic(folder / "index.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / "index.html"


def main(arguments: list[str]) -> None:
    """The command line described at the top. Exits with one sentence where something is wrong."""
    try:
        match arguments:
            case ["normalise", executed, target]:
                normalise(executed, target)
            case ["merge", study]:
                merge_study(study)
                fill("README.md", "findings", findings_table(params.read_study(study).name))
            case ["dictionary"]:
                fill("data/README.md", "dictionary", dictionary())
            case ["render", study]:
                render(params.read_study(study))
            case ["progress"]:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Snakemake is told, and has the last word
                progress(sys.stdin)
            case ["html", folder]:
                print(f"Open {html(folder)} in a browser.")
            case ["check"]:
                found = [f"{n}: {p}" for n in sorted(NOTEBOOKS.glob("*.ipynb")) for p in problems(n)]
                if found:
                    sys.exit("\n".join(found))
            case _:
                usage = "normalise IN OUT | merge STUDY.yaml | dictionary | render STUDY.yaml | html FOLDER | progress"
                sys.exit(f"usage: python -m utils.notebooks {usage} | check")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
