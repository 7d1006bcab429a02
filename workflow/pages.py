"""Tables of Markdown that are made, not written: findings in docs/, columns in data/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from utils.run.files import atomic
from utils.run.layout import FIGURES, RESULTS, RUNS
from utils.run.tables import SCHEMAS, read_table


def fill(page: Path | str, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page of Markdown.

    page: its path; name: of the two markers; text: what goes between them.

    Raises ValueError where the page has no such markers.
    """
    before, rest = Path(page).read_text(encoding="utf-8").split(f"<!-- {name} -->")
    _, after = rest.split(f"<!-- /{name} -->")
    whole = f"{before}<!-- {name} -->\n\n{text.strip()}\n\n<!-- /{name} -->{after}"
    with atomic(page) as temporary:
        temporary.write_text(whole, encoding="utf-8")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown.

    >>> print(markdown(["x", "y"], [["1", "|2|"]]))
    | x | y |
    |---|---|
    | 1 | \\|2\\| |
    """
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([table[0], "|" + "---|" * len(header), *table[1:]])


def findings(study: str) -> pd.DataFrame:
    """A study's committed findings, without the columns that a page has no room for."""
    table = read_table(RESULTS / study / "findings.csv")
    return table.drop(columns=["source", "control"], errors="ignore")


def findings_table(study: str) -> str:
    """A study's findings as a table of Markdown, numbers to four digits."""
    table = findings(study)
    rows = [[_shown(value) for value in row] for row in table.itertuples(index=False)]
    return markdown(list(table.columns), rows)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"  # nan is not equal to itself
    return str(value)


def dictionary() -> str:
    """The columns of every result file as Markdown, from data/columns.yaml."""
    parts = []
    for file, columns in SCHEMAS.items():
        rows = [[f"`{name}`", dtype, meaning] for name, (dtype, meaning) in columns.items()]
        table = markdown(["column", "type", "meaning [unit]"], rows)
        parts.append(f"### {file}\n\n{table}")
    return "\n\n".join(parts)


def summary(study: str) -> str:
    """The study's findings as a short table of text, and where everything lies.

    Raises FileNotFoundError where there are none yet.
    """
    path = RESULTS / study / "findings.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no findings of study {study!r}: run `make study NAME={study}` first."
        )
    table = findings(study)
    width = table["quantity"].str.len().max()
    text = table.assign(quantity=table["quantity"].str.ljust(width)).to_string(
        index=False,
        float_format=lambda value: f"{value:.4g}",
        na_rep="",
        max_colwidth=None,
        justify="left",
    )
    return f"{text}\n\nTable    {path}\nFigures  {FIGURES / study}/\nRuns     {RUNS}/"
