"""The ladder of bounds over depth, from the committed measurements alone.

python -m utils.report.ladder   draws figures/digits_ladder/ladder from data/results
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from utils.figures import ROLES, band, save_figure, use_theme
from utils.run import RESULTS

STUDY = "digits_ladder"
# column `rung` of ladder.csv -> the rung's name in ROLES, from the loosest to the tightest
RUNGS = {
    "closed_form": "closed form",
    "activations": "activations",
    "tangents": "tangents",
    "majorant": "majorant",
}
CLOSE = ["tangents", "majorant", "certified"]  # those that a second panel magnifies
DECADES = ["decades", "low", "high"]


def decades_lost(ladder: pd.DataFrame, certified_cost: float) -> pd.DataFrame:
    r"""How far each rung is above the measured norm, over the networks of one depth.

    The certified norm has no rows of its own in the measurements: its decades are those of the
    widest interval of a network's examples.

    ladder          rows of data/results/digits_ladder/ladder.csv: a network, a part and a rung each
    certified_cost  of one certified norm [Hessian-vector products of one example]

    Returns a row for each rung and depth. `decades`: median of $\log_{10}$(bound / measured) over
    networks and parts, where a part counts with the median of its examples; `low`, `high`: its
    range; `networks`: how many; `products`: median cost of one example [Hessian-vector products].

    >>> row = {"run": "a", "depth": 1, "rung": "majorant", "products": 70.0}
    >>> ladder = pd.DataFrame([row | {"ratio_median": 10.0, "certificate_max": 1.0}])
    >>> decades_lost(ladder, certified_cost=28.0)[["rung", "decades"]].values.tolist()
    [['majorant', 1.0], ['certified', 0.0]]
    """
    asked = ladder[ladder["rung"].isin(RUNGS)]
    bounds = asked.assign(rung=asked["rung"].map(RUNGS), ratio=asked["ratio_median"])
    certified = ladder.assign(
        rung="certified", ratio=ladder["certificate_max"], products=certified_cost
    )
    rows = pd.concat([bounds, certified])
    rows["decades"] = np.log10(rows["ratio"])
    table = rows.groupby(["rung", "depth"], as_index=False).agg(
        decades=("decades", "median"),
        low=("decades", "min"),
        high=("decades", "max"),
        networks=("run", "nunique"),
        products=("products", "median"),
    )
    order = [*RUNGS.values(), "certified"]
    table = table.round(6)  # the same digits on every machine
    return table.sort_values("rung", key=lambda names: names.map(order.index), kind="stable")


def cost_label(products: pd.Series) -> str:
    """A rung's cost in words, a range where it grows with the depth.

    products  cost at each depth [Hessian-vector products of one example]

    >>> cost_label(pd.Series([71.6, 72.0])), cost_label(pd.Series([0.9, 0.3]))
    ('72', 'less than 1')
    >>> cost_label(pd.Series([1544.6, 39720.2]))
    '1,500 to 40,000'
    """
    low, high = products.min(), products.max()
    if high < 1:
        return "less than 1"
    shown = [f"{float(f'{value:.2g}'):,.0f}" for value in (low, high)]
    return " to ".join(dict.fromkeys(shown))


def draw(table: pd.DataFrame) -> Figure:
    """The picture: all rungs in decades, and the tight ones magnified; the legend has the cost.

    table  what `decades_lost` returns

    >>> row = {"rung": "majorant", "depth": 1, "decades": 0.1, "low": 0.0, "high": 0.2}
    >>> figure = draw(pd.DataFrame([row | {"products": 72.0}]))
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['majorant: 72']
    """
    figure = Figure(figsize=(8.3, 3.3), layout="constrained")
    whole, magnified = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for rung, rows in table.groupby("rung", sort=False):
        label = f"{rung}: {cost_label(rows['products'])}"
        draw_rung(whole, rows, rung, label)
        if rung in CLOSE:
            factors = rows.copy()
            factors[DECADES] = 10 ** rows[DECADES]
            draw_rung(magnified, factors, rung, label)
    whole.set(ylabel=r"$\log_{10}$ (bound / measured)", title="Decades lost by each bound")
    magnified.set(yscale="log", ylabel="bound / measured", title="The tight ones, as a factor")
    magnified.set_ylim(0.95, 5.5)
    magnified.set_yticks([1, 1.5, 2, 3, 5])
    magnified.yaxis.set_major_formatter(FuncFormatter(lambda factor, _: f"{factor:g}"))
    magnified.yaxis.set_minor_locator(NullLocator())
    for ax in (whole, magnified):
        ax.set(xlabel="transformer blocks", xticks=sorted(table["depth"].unique()))
    title = "Bound: its cost for one example\n[Hessian-vector products]"
    handles = whole.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", title=title, alignment="left")
    return figure


def draw_rung(ax: Axes, rows: pd.DataFrame, rung: str, label: str) -> None:
    """One line over depth with the range of the networks.

    ax     where to draw
    rows   of one rung, with columns depth, decades, low and high
    rung   its name in ROLES
    label  for the legend

    >>> ax = Figure().subplots()
    >>> rows = pd.DataFrame({"depth": [1], "decades": [1.0], "low": [0.9], "high": [1.1]})
    >>> draw_rung(ax, rows, "majorant", label="majorant")
    >>> len(ax.lines)
    1
    """
    ax.plot(rows["depth"], rows["decades"], label=label, **ROLES[rung])
    band(ax, rows["depth"], rows["low"], rows["high"], role=rung)


def main() -> None:
    """Draw figures/digits_ladder/ladder.png, .pdf and .csv.

    The cost of a certified norm is that of the quickstart, whose network is one of the ladder's.

    >>> main()  # doctest: +SKIP
    """
    use_theme()
    ladder = pd.read_csv(RESULTS / STUDY / "ladder.csv")
    quickstart = pd.read_csv(RESULTS / "quickstart" / "bounds.csv")
    cost = quickstart.loc[quickstart["rung"] == "certified", "products"].median()
    table = decades_lost(ladder, certified_cost=cost)
    print(save_figure(draw(table), STUDY, "ladder", table))


if __name__ == "__main__":
    main()
