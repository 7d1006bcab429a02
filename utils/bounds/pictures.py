"""The figures of notebook 04; one colour is one rung everywhere."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from utils.figures import ROLES
from utils.hessian import blocks as blocks_of_hessian
from utils.run.streams import numpy_generator

STYLES = {
    "closed_form": ROLES["closed form"],
    "prior": ROLES["bound"],
    "prior, measured": ROLES["tighter"],
}
SHORT = blocks_of_hessian.ROLES | {"norm1": "LN1", "norm2": "LN2"}


def style(rung: str) -> dict:
    """How a rung is drawn.

    >>> style("majorant") == ROLES["majorant"]
    True
    """
    return {"marker": "o", "markersize": 3.5} | (STYLES.get(rung) or ROLES[rung])


def shown(rung: str) -> str:
    """A rung's name for people.

    >>> shown("closed_form")
    'closed form'
    """
    return rung.replace("_", " ")


def ladder(table: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Bound against measured norm, and the decades that every rung loses, with its cost.

    table, summary  of `compare.Comparison.table` and `compare.summary`

    >>> from utils.bounds.compare import summary
    >>> row = {"rung": "prior", "ratio": 2.0, "products": 1.0, "bound": 2.0, "measured": 1.0}
    >>> table = pd.DataFrame([row, row | {"bound": 6.0, "ratio": 3.0, "measured": 2.0}])
    >>> plt.close(ladder(table, summary(table)))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.3, 3.9))
    for rung in summary.index:
        rows = table[table["rung"] == rung]
        look = style(rung) | {"linestyle": "none", "markersize": 4, "label": shown(rung)}
        left.loglog(rows["measured"], rows["bound"], **look)
    ends = table["measured"].agg(["min", "max"])
    left.plot(ends, ends, **ROLES["reference"])
    left.set(xlabel="measured norm [nat/w²]", ylabel="bound [nat/w²]", title="Bound against norm")
    left.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4)
    logs = [np.log10(table.loc[table["rung"] == r, "ratio"]) for r in summary.index]
    names = [f"{shown(r)}: {summary.loc[r, 'products']:.3g}" for r in summary.index]
    boxes = right.boxplot(
        logs,
        orientation="horizontal",
        tick_labels=names,
        whis=(0, 100),
        patch_artist=True,
        medianprops={"color": "k"},
    )
    for box, rung in zip(boxes["boxes"], summary.index, strict=True):
        box.set_facecolor(style(rung)["color"])
    right.invert_yaxis()
    right.set(xlabel=r"$\log_{10}$ (bound / measured)", title="Decades lost (cost in products)")
    return figure


def growth(table: pd.DataFrame) -> Figure:
    """The decades a bound loses: one panel for each sweep of the table of `compare.growth`, one
    line for each rung.

    >>> columns = {"sweep": "depth", "value": [1, 2], "log10": [1.0, 2.0]}
    >>> rows = [pd.DataFrame(columns | {"rung": rung}) for rung in ("measured", "prior")]
    >>> plt.close(growth(pd.concat(rows)))
    """
    sweeps = list(table["sweep"].unique())
    figure, axes = plt.subplots(1, len(sweeps), figsize=(8.3, 3.2), sharey=True, squeeze=False)
    for ax, sweep in zip(axes[0], sweeps, strict=True):
        rows = table[table["sweep"] == sweep].pivot(index="value", columns="rung", values="log10")
        lost = rows.drop(columns="measured").sub(rows["measured"], axis=0)
        for rung, curve in lost.items():
            ax.plot(curve.index, curve, **(style(rung) | {"label": shown(rung)}))
        values = list(rows.index)
        label = "scale of weights" if sweep == "scale" else sweep
        ax.set(xlabel=label, xscale="linear" if sweep == "depth" else "log")
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.minorticks_off()
    axes[0, 0].set_ylabel(r"$\log_{10}$ (bound / measured)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5)
    return figure


def labels(groups: Iterable[str]) -> list[str]:
    """Names of groups of weights, short.

    >>> labels(["embed", "blocks.0.mlp.fc1"])
    ['embed', 'W1 1']
    """
    short = []
    for group in groups:
        parts = group.split(".", 2)
        known = parts[0] == "blocks" and len(parts) == 3 and parts[2] in SHORT
        short.append(f"{SHORT[parts[2]]} {int(parts[1]) + 1}" if known else group)
    return short


def blocks(bound: np.ndarray, exact: np.ndarray, groups: Iterable[str], rung: str) -> Figure:
    """The bound (m, m) of blocks, their exact norms (m, m) on the same scale, and the ratio: log10.

    groups  of weights
    rung    of the bound

    >>> plt.close(blocks(np.eye(2) + 1, np.eye(2) + 0.5, ["embed", "head"], "prior"))
    """
    names = labels(groups)
    floor = 1e-12 * exact.max()
    logs = [np.log10(np.maximum(m, floor)) for m in (bound, exact)]
    ratio = np.where(exact > floor, logs[0] - logs[1], np.nan)
    figure, axes = plt.subplots(1, 3, figsize=(8.3, 3.1))
    titles = (f"bound, {shown(rung)}", "measured", "bound / measured")
    for ax, values, title in zip(axes, [*logs, ratio], titles, strict=True):
        scale = {} if values is ratio else {"vmin": logs[1].min(), "vmax": logs[0].max()}
        frame = pd.DataFrame(values, names, names)
        bar = {"shrink": 0.6, "label": r"$\log_{10}$"}
        sns.heatmap(frame, ax=ax, square=True, cmap="viridis", cbar_kws=bar, **scale)
        ax.set_title(title)
        ax.tick_params(labelsize=6)
    return figure


def constants(summary: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Rungs (median over examples) and printed constants over the norm on one axis.

    summary, published  of `compare.summary` and `compare.published`

    >>> published = pd.DataFrame({"constant": ["a constant"], "printed / exact": [0.5]})
    >>> plt.close(constants(pd.DataFrame({"median": [2.0]}, ["prior"]), published))
    """
    figure, ax = plt.subplots(figsize=(8.3, 3.6))
    names = [shown(rung) for rung in summary.index] + list(published["constant"])
    ratios = [*summary["median"], *published["printed / exact"]]
    colours = [style(rung)["color"] for rung in summary.index] + ["k"] * len(published)
    for i, (ratio, colour) in enumerate(zip(ratios, colours, strict=True)):
        ax.plot(np.log10(ratio), i, "o" if i < len(summary) else "x", color=colour)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.axvline(0, **ROLES["reference"])
    ax.invert_yaxis()
    ax.set(xscale="symlog", xlabel=r"$\log_{10}$ of the constant over the norm", xlim=(-3, 70))
    ax.set_xticks([-1, 0, 1, 3, 10, 30], ["-1", "0", "1", "3", "10", "30"])
    return figure


def misfit(norms: pd.DataFrame) -> Figure:
    """Norms of examples against q = 1 - exp(-loss).

    norms  columns part, q, value

    >>> columns = {"part": "training", "q": [0.1, 0.5], "value": [1.0, 4.0]}
    >>> plt.close(misfit(pd.DataFrame(columns)))
    """
    figure, ax = plt.subplots(figsize=(6.5, 3.6))
    for part, rows in norms.groupby("part", sort=False):
        look = ROLES.get(part, ROLES["control"]) | {"linestyle": "none", "marker": "."}
        label = f"{part} (n = {len(rows)})"
        ax.loglog(rows["q"], rows["value"], **(look | {"markersize": 3, "label": label}))
    ends = np.array([norms["q"].min(), 1.0])
    level = (norms["value"] / norms["q"]).median()
    ax.plot(ends, level * ends, label="proportional to q", **ROLES["reference"])
    ax.set(xlabel="q = 1 - exp(-loss)", ylabel="norm of the example's Hessian [nat/w²]")
    ax.legend()
    return figure


def misfit_power(norms: pd.DataFrame, seed: int) -> tuple[float, float, float]:
    """The power of the norm in q by least squares, with a 95 % bootstrap interval over examples:
    (low, power, high).

    norms  columns q, value
    seed   of the bootstrap

    >>> q = np.geomspace(0.01, 1, 50)
    >>> round(misfit_power(pd.DataFrame({"q": q, "value": q**2}), 1)[1], 6)
    2.0
    """
    logs = np.log(norms[["q", "value"]].to_numpy())
    draws = numpy_generator("misfit", seed).integers(len(logs), size=(400, len(logs)))
    slopes = [np.polyfit(logs[draw, 0], logs[draw, 1], 1)[0] for draw in draws]
    power = np.polyfit(logs[:, 0], logs[:, 1], 1)[0]
    low, high = np.quantile(slopes, [0.025, 0.975])
    return float(low), float(power), float(high)
