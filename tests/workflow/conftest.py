"""A notebook that keeps every rule, for the tests of what executes and checks notebooks."""

from pathlib import Path

import pytest
from little_notebook import cell, notebook, stream

from workflow.execution import write

PARAMETERS = """study: str = "quickstart"  # name of the study
runs: list = ["quickstart"]  # its runs"""


@pytest.fixture
def good(tmp_path) -> tuple[Path, dict]:
    """The path and the content of a notebook 07 that keeps every rule."""
    links = "# Report\n[data](../data.md) [web](https://example.org/a/b.c)"
    table = "A sentence with $|x|$.\n\n| a | b |\n|---|---|\n| $x$ | 1/2 |"
    tagged = {"tags": ["parameters"]}
    content = notebook(
        cell("markdown", links, "title"),
        cell("code", PARAMETERS, "parameters", metadata=tagged, execution_count=1),
        cell("code", "x = 1", "check", execution_count=2, outputs=[stream("fine\n")]),
        cell("markdown", table, "prose"),
        cell("code", "print(x)", "body", execution_count=3),
    )
    (tmp_path / "data.md").write_text("data")
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "07_study_report.ipynb"
    write(path, content)
    return path, content
