"""The figure of the ladder: the committed one, byte-stable, its numbers those of the study."""

from pathlib import Path

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")

from utils.figures import save_figure, use_theme
from utils.report import ladder

ROOT = Path(__file__).resolve().parents[2]


QUICKSTART = pd.read_csv(ROOT / "data" / "results" / "quickstart" / "bounds.csv")
COST = QUICKSTART.loc[QUICKSTART["rung"] == "certified", "products"].mean()


@pytest.fixture
def table():
    measured = pd.read_csv(ROOT / "data" / "results" / "digits_ladder" / "ladder.csv")
    return ladder.decades_lost(measured, certified_cost=COST)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_theme()
    yield tmp_path
    matplotlib.rcdefaults()


def test_committed_numbers_are_those_of_the_measurements(table):
    committed = pd.read_csv(ROOT / "figures" / "digits_ladder" / "ladder.csv")
    pd.testing.assert_frame_equal(committed, table.reset_index(drop=True))


def test_no_bound_is_below_the_norm(table):
    assert (table["low"] > 0).all()


def test_a_rung_is_tighter_than_the_one_before(table):
    decades = table.pivot(index="depth", columns="rung", values="decades")
    order = [*ladder.RUNGS.values(), "certified"]
    assert (decades[order].diff(axis=1).iloc[:, 1:] < 0).all(axis=None)


def test_same_numbers_give_the_same_bytes(table, folder):
    written = []
    for _ in range(2):
        path = save_figure(ladder.draw(table), "digits_ladder", "ladder", table)
        written.append([path.with_suffix(end).read_bytes() for end in (".png", ".pdf", ".csv")])
    assert written[0] == written[1]


def test_each_line_has_its_cost_in_the_legend(table, folder):
    figure = ladder.draw(table)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "closed form: less than 1",
        "activations: 1 to 2",
        "tangents: 1,500 to 40,000",
        "majorant: 72",
        f"certified: {COST:.3g}",
    ]
