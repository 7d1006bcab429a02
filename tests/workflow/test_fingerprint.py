"""What a notebook depends on: its code and the modules that it imports, and nothing else."""

from pathlib import Path

import pytest

from workflow.execution import read, write
from workflow.fingerprint import code_hash


@pytest.fixture
def tree(tmp_path, good) -> Path:
    """A notebook that imports utils.a, which imports utils.b; utils.c stands aside."""
    path, notebook = good
    notebook["cells"][4]["source"] = "from utils.a import f\nf()"
    write(path, notebook)
    (tmp_path / "utils").mkdir()
    for name, text in {
        "__init__": '"""Package."""\n',
        "a": '"""Doc."""\nfrom utils import b\ndef f():\n    """Doc."""\n    return b.g()  # why\n',
        "b": "def g():\n    return 1\n",
        "c": "x = 1\n",
    }.items():
        (tmp_path / "utils" / f"{name}.py").write_text(text)
    return tmp_path


def hash_of(tree: Path) -> str:
    return code_hash(tree / "notebooks" / "07_study_report.ipynb", tree)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("notebooks/07_study_report.ipynb", "A sentence", "Another sentence", False),
        ("notebooks/07_study_report.ipynb", "# name of the study", "# the study", False),
        ("notebooks/07_study_report.ipynb", "fine", "another output", False),
        ("notebooks/07_study_report.ipynb", "x = 1", "x = 2", True),
        ("notebooks/07_study_report.ipynb", '= \\"quickstart\\"', '= \\"other\\"', True),
        ("utils/a.py", "Doc.", "Other.", False),
        ("utils/a.py", "# why", "# because", False),
        ("utils/a.py", "return b.g()", "return  b.g()", False),
        ("utils/a.py", "b.g()", "b.g() + 1", True),
        ("utils/b.py", "return 1", "return 2", True),
        ("utils/c.py", "x = 1", "x = 2", False),
        ("utils/__init__.py", '"""Package."""', "x = 1", True),
    ],
)
def test_the_hash_sees_code_and_nothing_else(tree, file, old, new, changes):
    before = hash_of(tree)
    edit(tree / file, old, new)
    assert (hash_of(tree) != before) == changes


@pytest.mark.parametrize(
    "statement",
    [
        "import utils.a",
        "from utils import a",
        "from utils.a import f",
        "import utils.a as z",
        "def g():\n    import utils.a",
    ],
)
def test_the_hash_follows_every_form_of_import(tree, statement):
    path = tree / "notebooks" / "07_study_report.ipynb"
    notebook = read(path)
    notebook["cells"][4]["source"] = statement
    write(path, notebook)
    before = hash_of(tree)
    edit(tree / "utils" / "b.py", "return 1", "return 2")
    assert hash_of(tree) != before
    edit(tree / "utils" / "a.py", "from utils import b", "from . import b")
    before = hash_of(tree)
    edit(tree / "utils" / "b.py", "return 2", "return 3")
    assert hash_of(tree) != before


def test_the_hash_follows_packages(tree):
    """utils.a as a folder: its own __init__, and its modules by relative imports."""
    (tree / "utils" / "a.py").unlink()
    (tree / "utils" / "a").mkdir()
    (tree / "utils" / "a" / "__init__.py").write_text("from utils.a.inner import f\n")
    (tree / "utils" / "a" / "inner.py").write_text("from .deep import g\nfrom .. import b\n")
    (tree / "utils" / "a" / "deep.py").write_text("def g():\n    return 1\n")
    for file, old, new in (
        ("a/__init__.py", "import f", "import f as h"),
        ("a/inner.py", "import g", "import g as h"),
        ("a/deep.py", "return 1", "return 2"),
        ("b.py", "return 1", "return 2"),
        ("__init__.py", '"""Package."""', "x = 1"),
    ):
        before = hash_of(tree)
        edit(tree / "utils" / file, old, new)
        assert hash_of(tree) != before, file


def test_code_that_does_not_parse_is_one_sentence(tree):
    edit(tree / "utils" / "b.py", "return 1", "return (")
    with pytest.raises(ValueError, match="does not parse"):
        hash_of(tree)
