"""The paper's labels, references and citations fit together, and the code cites only labels that
exist.

Reads the LaTeX sources as text, so no LaTeX installation is needed.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "paper"

# Each numbered environment and the prefix of its labels.
PREFIX = {
    "theorem": "thm",
    "proposition": "prop",
    "lemma": "lem",
    "corollary": "cor",
    "definition": "def",
    "remark": "rem",
}
# Labels as docstrings and notebooks cite them; the lookbehind keeps out f"{eq:...}" and x[eq:n].
CITED_IN_CODE = re.compile(
    r"(?<![\w{\[:])((?:thm|prop|lem|cor|eq|rem|def):[a-z][a-z0-9-]*[a-z0-9])"
)
LABEL = re.compile(r"\\label\{([^}]+)\}")
REFERENCE = re.compile(r"\\(?:ref|eqref|[cC]ref|autoref)\{([^}]+)\}")
CITATION = re.compile(r"\\cite[a-z]*(?:\[[^\]]*\])*\{([^}]+)\}")
BIB_ENTRY = re.compile(r"^@\w+\{([^,\s]+),", re.MULTILINE)
COMMENT = re.compile(r"(?<!\\)%.*")
STATEMENT = re.compile(
    r"\\begin\{(" + "|".join(PREFIX) + r")\}(?:\[[^\]]*\])?\s*(?:\\label\{([^}]+)\})?"
)


def tex() -> str:
    """All LaTeX sources of the paper, comments removed (generated tables included, the build folder
    not)."""
    files = sorted(p for p in PAPER.rglob("*.tex") if "build" not in p.relative_to(PAPER).parts)
    return "\n".join(COMMENT.sub("", p.read_text(encoding="utf-8")) for p in files)


def keys(pattern: re.Pattern, text: str) -> set[str]:
    """The comma-separated keys inside all matches of a one-group pattern."""
    return {key.strip() for match in pattern.findall(text) for key in match.split(",")}


def code_texts() -> dict[str, str]:
    """Text that may cite labels: modules of utils, and the cells (not the outputs) of the
    notebooks."""
    texts = {
        p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
        for p in (ROOT / "utils").rglob("*.py")
    }
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path.relative_to(ROOT).as_posix()] = "\n".join(
            "".join(cell["source"]) for cell in cells
        )
    return texts


def test_labels_are_unique():
    repeated = [label for label, count in Counter(LABEL.findall(tex())).items() if count > 1]
    assert not repeated, f"defined more than once: {repeated}"


@pytest.mark.parametrize("path", sorted(code_texts()))
def test_labels_cited_in_code_exist(path):
    missing = set(CITED_IN_CODE.findall(code_texts()[path])) - set(LABEL.findall(tex()))
    assert not missing, f"{path} cites labels that are not in paper/*.tex: {sorted(missing)}"


def test_references_resolve():
    missing = keys(REFERENCE, tex()) - set(LABEL.findall(tex()))
    assert not missing, f"referenced but not defined: {sorted(missing)}"


def test_citations_and_bibliography_agree():
    entries = BIB_ENTRY.findall((PAPER / "references.bib").read_text(encoding="utf-8"))
    assert len(entries) == len(set(entries)), "a key stands twice in references.bib"
    cited = keys(CITATION, tex())
    assert cited == set(entries), (
        f"cited without entry: {cited - set(entries)}; never cited: {set(entries) - cited}"
    )


def test_statements_are_labelled():
    statements = STATEMENT.findall(tex())
    assert (
        len(statements) == len(re.findall(r"\\begin\{(?:" + "|".join(PREFIX) + r")\}", tex())) > 0
    )
    wrong = [(env, label) for env, label in statements if not label.startswith(PREFIX[env] + ":")]
    assert not wrong, (
        f"statements without a label right after \\begin, or with another prefix: {wrong}"
    )


def test_inputs_exist():
    missing = [
        n
        for n in re.findall(r"\\input\{([^}]+)\}", tex())
        if not (PAPER / n).with_suffix(".tex").exists()
    ]
    assert not missing, f"\\input of files that are not there: {missing}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "Source: (thm:one-step-ball, eq:one-step-ball-a).",
            ["thm:one-step-ball", "eq:one-step-ball-a"],
        ),
        ("`prop:rate`; lem:softmax.", ["prop:rate", "lem:softmax"]),
        ('f"{eq:.3g} {eq:width}" x[eq:stop]', []),
    ],
)
def test_the_pattern_for_citations(text, found):
    assert CITED_IN_CODE.findall(text) == found
