"""Each rule for committed notebooks notices its breach."""

import pytest
from little_notebook import stream
from nbformat import from_dict

from workflow.checks import problems
from workflow.execution import code_cells, write


def test_a_good_notebook_has_no_problems(good):
    path, notebook = good
    assert problems(path) == []
    for c in code_cells(notebook):
        c["execution_count"], c["outputs"] = None, []
    write(path, notebook)
    assert problems(path) == []


SCRIPT = {
    "output_type": "display_data",
    "data": {"application/javascript": "x"},
    "metadata": {},
}


def add(notebook, place: int, text: str) -> None:
    notebook.cells[place].source += text


BREACHES = {
    "tagged `parameters`": lambda n: n["cells"][1]["metadata"].clear(),
    "only it": lambda n: n["cells"][2]["metadata"].update(tags=["parameters"]),
    "not a literal": lambda n: add(n, 1, "\nimport os"),
    "is not of type": lambda n: n["cells"][1].update(
        source="study: str = 3  # x\nruns: list = []  # x"
    ),
    "no trailing comment": lambda n: n["cells"][1].update(
        source="study: str = '#'\nruns: list = []  # x"
    ),
    "make them agree": lambda n: n["cells"][1].update(
        source="studdy: str = ''  # x\nruns: list = []  # x"
    ),
    "execution counts": lambda n: n["cells"][2].update(execution_count=7),
    "widgets": lambda n: n["metadata"].update(widgets={}),
    "under 1 MB": lambda n: n["cells"][2]["outputs"].append(stream("x" * 1_000_000)),
    "more than 25 lines": lambda n: n["cells"][4].update(source="x = 1\n" * 26),
    "magic": lambda n: n["cells"][4].update(source="%matplotlib inline"),
    "shell": lambda n: n["cells"][4].update(source="!ls"),
    "carries an error": lambda n: n["cells"][4]["outputs"].append(
        from_dict({"output_type": "error", "ename": "E", "evalue": "", "traceback": []})
    ),
    "standard error": lambda n: n["cells"][4]["outputs"].append(stream("x", "stderr")),
    "JavaScript": lambda n: n["cells"][4]["outputs"].append(from_dict(SCRIPT)),
    "absolute path /home/me/x.csv": lambda n: n["cells"][4]["outputs"].append(
        stream("see /home/me/x.csv\n")
    ),
    "absolute path /srv/data": lambda n: n["cells"][4].update(source="open('/srv/data')"),
    "prose shows the absolute path": lambda n: add(n, 3, "\nin `/usr/share/x`"),
    "no sentence before": lambda n: n["cells"].pop(3),
    "heading holds math": lambda n: add(n, 3, "\n## Norm $x$"),
    "math in a table": lambda n: add(n, 3, "\n| $|x|$ | 1 |"),
    "link none.md": lambda n: add(n, 3, "\n[x](none.md)"),
    "link ../utils/none.py#L3": lambda n: add(n, 3, "\n[x](../utils/none.py#L3)"),
}


@pytest.mark.parametrize("says", BREACHES)
def test_a_breach_is_noticed(good, says):
    path, notebook = good
    BREACHES[says](notebook)
    write(path, notebook)
    assert any(says in problem for problem in problems(path)), problems(path)
