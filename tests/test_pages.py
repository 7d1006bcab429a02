"""The pages that people read: short, their links resolve, their numbers are the committed ones."""

import re
from pathlib import Path

import pandas as pd
import pytest

from utils.report.networks import networks_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md"]
PAGES += [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    missing = []
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_readme_is_short_and_begins_with_commands_and_figure():
    readme = text_of("README.md")
    assert len(readme) <= 12_000
    first_screen = readme.split("\n## ")[0]
    for needed in ("make reproduce", "make test", "figures/digits_ladder/ladder.png"):
        assert needed in first_screen


def test_tables_of_networks_is_the_committed_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert networks_table() in text_of("README.md")


def finding(study: str, quantity: str) -> pd.Series:
    table = pd.read_csv(RESULTS / study / "findings.csv")
    rows = table[table["quantity"] == quantity]
    assert len(rows) == 1
    return rows.iloc[0]


ONE_STEP = "slope of the one-step change at fixed weights"
GAP = "the training mean ends at the held-out mean [nat]"
QUOTED = [  # study, quantity, how the README writes it: value, low and high times a factor
    ("quickstart", f"{ONE_STEP}, trained", "{0:.3f} [{1:.3f}, {2:.3f}]", 1),
    ("quickstart", f"{ONE_STEP}, random numbers", "{0:.3f} [{1:.3f}, {2:.3f}]", 1),
    ("quickstart", GAP, "{0:.2f} nat [{2:.2f}, {1:.2f}] on digits", -1),
    ("vit_cifar10", GAP, "{0:.2f} [{2:.2f}, {1:.2f}] on CIFAR-10", -1),
    ("quickstart", "k, surface, tau = 0.1", "{0:.0f} by the pilot's spread", 1),
    ("quickstart", "k, surface, tau = 0.1", "fewer than {1:.0f} are too few", 1),
    ("quickstart", "k, surface, tau = 0.1", "{2:.0f} suffice", 1),
    ("quickstart", "k, excess, tau = 0.1", "at most {2:,.0f} for 0.1 nat", 1),
    (
        "digits_convergence",
        "failures, surface, pilot's S: worst",
        "{0:.0f} % [{1:.0f}, {2:.0f}]",
        100,
    ),
    (
        "digits_convergence",
        "failures, surface, upper limit of S: worst",
        "{0:.2f} % [{1:.2f}, {2:.2f}]",
        100,
    ),
]


@pytest.mark.parametrize(("study", "quantity", "form", "factor"), QUOTED)
def test_readme_quotes_the_committed_findings(study, quantity, form, factor):
    numbers = finding(study, quantity)[["value", "low", "high"]] * factor
    assert form.format(*numbers) in text_of("README.md")


def test_readme_quotes_the_ladder():
    table = pd.read_csv(ROOT / "figures" / "digits_ladder" / "ladder.csv")
    rows = table.set_index(["rung", "depth"])
    readme = text_of("README.md")
    lost = rows["decades"]["closed form"]
    assert f"loses {(lost[6] - lost[1]) / 5:.0f} decades a block" in readme
    assert f"within a factor of {10 ** rows['decades']['majorant', 6]:.1f} at six blocks" in readme
    assert f"for {rows['products']['majorant', 6]:.0f} Hessian-vector products" in readme
    assert f"costs {rows['products']['certified', 6]:.0f} Hessian-vector products" in readme
    assert 10 ** rows["high"]["certified"].max() < 1.05
    assert set(rows["networks"]["closed form"]) == {9}
    assert set(rows["networks"]["tangents"]) == {6}
