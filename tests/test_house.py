"""The house rules that a machine can hold: what imports what, and how much a folder shows."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each folder may import those before it. Training measures: it stands where `hessian` does.
ORDER = ["run", "data", "networks", "calculus", "hessian", "bounds", "surface", "sample_size"]
ORDER += ["report"]
EXCEPT = dict.fromkeys(["utils.networks.training", "utils.networks.polishing"], "hessian")
MOST_NAMES = 10


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


UTILS = [path for path in sorted((ROOT / "utils").rglob("*.py"))]
TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py"))]
WORKFLOW = sorted((ROOT / "workflow").rglob("*.py"))
FOLDERS = [path.parent for path in UTILS if path.name == "__init__.py"]
FOLDERS.remove(ROOT / "utils")


def of_module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import, those within `if` and `try` of the module included, without
    what only a type checker reads."""
    found = []
    todo = list(tree.body)
    while todo:
        statement = todo.pop()
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        found.append(statement)
        if isinstance(statement, ast.If | ast.Try | ast.With):
            todo += [
                child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)
            ]
            todo += [s for handler in getattr(statement, "handlers", []) for s in handler.body]
    return found


def imports(path: Path, statements: list[ast.AST]) -> set[str]:
    """Dotted names that the statements import; a name that comes from a module is added to it."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    names = set()
    for node in statements:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def folder_of(name: str) -> str:
    """The folder of utils that a dotted name lies in, or its own name where it is a file."""
    return name.partition(".")[2].partition(".")[0]


def rank(name: str) -> int:
    folder = EXCEPT.get(".".join(name.split(".")[:3]), folder_of(name))
    return ORDER.index(folder)


@pytest.mark.parametrize("path", UTILS, ids=dotted)
def test_imports_point_down(path):
    names = imports(path, of_module_level(tree_of(path)))
    assert not {name for name in names if name.split(".")[0] in ("workflow", "tests")}
    if folder_of(dotted(path)) not in ORDER:
        return  # figures.py, utils/__init__.py
    ours = {name for name in names if name.startswith("utils.") and folder_of(name) in ORDER}
    above = sorted(name for name in ours if rank(name) > rank(dotted(path)))
    assert not above, f"{dotted(path)} imports {above}, which stand above it"


@pytest.mark.parametrize("folder", FOLDERS, ids=dotted)
def test_a_folder_shows_few_names(folder):
    for statement in tree_of(folder / "__init__.py").body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            assert len(ast.literal_eval(statement.value)) <= MOST_NAMES
            return
    raise AssertionError(f"{dotted(folder)}/__init__.py has no __all__: say what it shows.")


def private_names(path: Path) -> set[str]:
    """Underscore names of our modules that a file imports, or takes from a module it imports."""
    tree = tree_of(path)
    names = imports(path, list(ast.walk(tree)))
    ours = {name for name in names if name.split(".")[0] in ("utils", "workflow")}
    modules = {name.rpartition(".")[2] for name in ours}
    for node in ast.walk(tree):
        aliases = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules |= {a.asname for a in aliases if a.asname and a.name.rpartition(".")[2] in modules}
    found = {name for name in ours if is_private(name.rpartition(".")[2])}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and is_private(node.attr):
                found.add(f"{node.value.id}.{node.attr}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", UTILS + WORKFLOW + TESTS, ids=dotted)
def test_nobody_reads_a_private_name_of_another_module(path):
    assert not private_names(path)


@pytest.mark.parametrize("path", TESTS, ids=dotted)
def test_no_test_file_imports_another(path):
    names = imports(path, list(ast.walk(tree_of(path))))
    parts = {part for name in names for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_")}


def test_the_rules_notice_a_breach(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "utils" / "data" / "reader.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from utils.run import files as f, parameters\n"
        "from .split import _halves\n"
        "if f._plain:\n"
        "    from utils.networks import vit\n"
        "def later():\n"
        "    from utils.report import tables\n"
    )
    assert private_names(path) == {"utils.data.split._halves", "f._plain"}
    with pytest.raises(AssertionError, match=r"imports \['utils.networks.vit'\]"):
        test_imports_point_down(path)
    (path.parent / "__init__.py").write_text(f"__all__ = {[str(i) for i in range(11)]}")
    with pytest.raises(AssertionError):
        test_a_folder_shows_few_names(path.parent)
