"""The figures of notebook 07."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from utils.bounds.pictures import shown, style
from utils.figures import ROLES, band, few_decades
from utils.surface.pictures import LOOKS, SAMPLES

RADIUS = "distance from w0 [fraction of |w0|]"


def ladder(bounds: pd.DataFrame, rungs: Sequence[str]) -> Figure:
    """Bounds against measured norms.

    bounds  bounds.csv of all runs, norms of 0 left out
    rungs   their names

    >>> columns = {"rung": "prior", "measured": [1.0, 2.0], "bound": [2.0, 4.0]}
    >>> plt.close(ladder(pd.DataFrame(columns), ["prior"]))
    """
    figure, ax = plt.subplots(figsize=(8, 4.2))
    for rung in rungs:
        t = bounds[bounds["rung"] == rung]
        look = style(rung) | {"linestyle": "none", "markersize": 4}
        ax.loglog(t["measured"], t["bound"], label=f"{shown(rung)} (n = {len(t)})", **look)
    ends = bounds["measured"].agg(["min", "max"])
    ax.plot(ends, ends, label="equal", **ROLES["reference"])
    ax.set(xlabel="measured norm of a sample's Hessian [nat/w²]", ylabel="bound on it [nat/w²]")
    ax.set_title("Bounds against measured norms")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def norms(table: pd.DataFrame) -> Figure:
    """The distribution of the examples' norms, by part.

    table  per_sample_norms.csv of all runs

    >>> columns = {"part": ["training", "calibration", "held-out"], "value": [1.0, 2.0, 3.0]}
    >>> plt.close(norms(pd.DataFrame(columns)))
    """
    figure, ax = plt.subplots(figsize=(7, 3.6))
    positive = np.log10(table.loc[table["value"] > 0, "value"])
    edges = np.linspace(positive.min(), positive.max(), 30)
    for part in ("training", "calibration", "held-out"):
        values = table.loc[table["part"] == part, "value"]
        zeros = f", of which {(values == 0).sum()} are 0" if (values == 0).any() else ""
        look = {"histtype": "step", "linewidth": 1.7, "color": ROLES[part]["color"]}
        label = f"{part} (n = {len(values)}{zeros})"
        ax.hist(np.log10(values[values > 0]), bins=edges, label=label, **look)
    ax.set(xlabel="log10 of the norm of a sample's Hessian [nat/w²]", ylabel="samples")
    ax.set_title("Per-sample Hessian norms")
    ax.legend()
    return figure


def attention(sides: pd.DataFrame) -> Figure:
    """Attention's blocks before and after training, a point a layer of a run.

    sides  of `attention_blocks`

    >>> index = pd.MultiIndex.from_product([["a"], [0], ["untrained", "trained"]])
    >>> index.names = ["run", "layer", "weights"]
    >>> pairs = ("VV", "QQ", "KK", "QK", "QV", "KV")
    >>> plt.close(attention(pd.DataFrame({pair: [1.0, 2.0] for pair in pairs}, index)))
    """
    figure, ax = plt.subplots(figsize=(5.6, 3.9))
    pairs = ("VV", "QQ", "KK", "QK", "QV", "KV")  # H is symmetric: the others are these again
    for name, colour in zip(pairs, sns.color_palette("colorblind", len(pairs)), strict=True):
        pair = sides[name].unstack("weights")
        grew = (pair["trained"] > pair["untrained"]).sum()
        look = {"markersize": 4, "alpha": 0.8, "color": colour}
        label = f"{name} ({grew} of {len(pair)} grew)"
        ax.loglog(pair["untrained"], pair["trained"], "o", label=label, **look)
    ends = sides[sides > 0].min(axis=None), sides.max(axis=None)
    ax.plot(ends, ends, label="no change", **ROLES["reference"])
    ax.set(xlabel="norm of the block, untrained [nat/w²]")
    ax.set(ylabel="norm of the block, trained [nat/w²]")
    ax.set_title("Attention's blocks of $H_k$, untrained and trained")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def convergence(steps: pd.DataFrame, distance: pd.DataFrame) -> Figure:
    """The change by one example, and the distance to the limit, of one run.

    steps     its rows "one step" of convergence.csv
    distance  its rows "distance"

    >>> columns = {"quantity": ["rms", "rms", "slope"], "k": [1, 2, 0], "value": [2.0, 1.0, -1.0]}
    >>> columns |= {"low": 1.0, "high": 2.0, "theory_low": 1.5}
    >>> table = pd.concat(pd.DataFrame(columns | {"weights": w}) for w in "abcd")
    >>> plt.close(convergence(table, table))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9))
    for ax, table in ((left, steps), (right, distance)):
        for (name, t), role in zip(table.groupby("weights", sort=False), LOOKS, strict=True):
            rms = t[t["quantity"] == "rms"]
            label, look = name, ROLES[role]
            if name == "sorted losses":
                look = {"color": "0.3", "linestyle": ":"}
            if ax is left:
                slope = t.loc[t["quantity"] == "slope", "value"]
                label = f"{name} ({slope.iloc[0]:.2f})"
            ax.loglog(rms["k"], rms["value"], label=label, **look)
            band(ax, rms["k"], rms["low"], rms["high"], role)
            if ax is right:
                ax.plot(rms["k"], rms["theory_low"], color="0.3", linestyle="--", linewidth=0.9)
    left.legend(fontsize=7.5, title="losses (slope)")
    right.legend(fontsize=7.5)
    left.set(xlabel=SAMPLES, ylabel="rms of $L_{k+1} - L_k$ [nat]")
    left.set_title("One step: slope -1 for random numbers too")
    right.set(xlabel=SAMPLES, ylabel="rms distance [nat]")
    right.set_title("Distance to the limit (dark dashes: exact)")
    return figure


def one_step_ball(ball: pd.DataFrame, shares: pd.DataFrame, bands: Mapping[str, list]) -> Figure:
    """The terms of the one-step theorem over the distance, and how often inequalities fail.

    ball    rows "ball" of convergence.csv of all runs
    shares  of `violations_by_radius`, with the column `steps`
    bands   the intervals of some of them

    >>> quantities = ["measured", "published", "first form", "gradient"]
    >>> ball = pd.DataFrame({"quantity": quantities, "radius": 0.1, "value": 1.0})
    >>> forms = dict.fromkeys(["published", "as printed", "first form", "proved"], 0.5)
    >>> shares = pd.DataFrame(forms | {"steps": 3}, [0.1])
    >>> plt.close(one_step_ball(ball, shares, {"proved": [(0.0, 1.0)]}))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    terms = ball.groupby(["quantity", "radius"])["value"].median().unstack(0)
    for name, role in zip(("measured", "published", "first form", "gradient"), ROLES):
        left.loglog(terms.index, terms[name], label=name, **ROLES[role])
    left.set(xlabel=RADIUS, ylabel="$(k+1)\\,|L_{k+1} - L_k|$ [nat]", title="Median terms")
    left.legend(fontsize=8)
    roles = {"published": "bound", "as printed": "control", "first form": "tighter"}
    for name, role in (roles | {"proved": "measured"}).items():
        if shares[name].isna().all():  # no bound at any radius: nothing to violate
            continue
        look = ROLES[role] | {"marker": "o"}
        right.semilogx(shares.index, shares[name], label=name, **look)
        if name in bands:
            low, high = np.transpose(bands[name])
            band(right, shares.index, low, high, role)
    right.set(xlabel=RADIUS, ylabel="share of the steps", ylim=(-0.03, 1.03))
    steps = " to ".join(map(str, sorted({shares["steps"].min(), shares["steps"].max()})))
    right.set_title(f"Violations ({steps} steps a radius; bands: 95 %)")
    right.legend(fontsize=8)
    return figure


def architecture(relative: pd.DataFrame, first: str) -> Figure:
    """Constants relative to the first architecture.

    relative  of `relative_constants`
    first     the first architecture

    >>> columns = {"quantity": ["S", "M"], "architecture": "depth 2", "seeds": 3}
    >>> columns |= {"ratio": 1.0, "low": 0.9, "high": 1.1}
    >>> plt.close(architecture(pd.DataFrame(columns), "depth 1"))
    """
    groups = relative.groupby("quantity", sort=False)
    height = 0.4 * (relative["architecture"].nunique() + 1) + 1.3
    figure, axes = plt.subplots(1, len(groups), figsize=(11, height), sharey=True)
    for ax, (quantity, t) in zip(axes, groups, strict=True):
        error = [t["ratio"] - t["low"], t["high"] - t["ratio"]]
        colour = ROLES["measured"]["color"]
        ax.errorbar(t["ratio"], t["architecture"], xerr=error, fmt="o", color=colour)
        ax.axvline(1, **ROLES["reference"])
        ax.set(xscale="log", xlabel=f"{quantity}, ratio")
        few_decades(ax.xaxis)
    title = f"Constants relative to {first} ({relative['seeds'].min()} seeds"
    figure.suptitle(f"{title}, 95 % for all {len(relative)})", fontsize=11)
    return figure


def published(beside: pd.DataFrame, inflation: float) -> Figure:
    """Published values beside ours, with the interval of one more run.

    beside     of `beside_published`
    inflation  by which the published values were divided [1]

    >>> row = {"data": "mnist", "depth": 1.0, "width": 8.0, "published": 1.1}
    >>> row |= {"ours": 1.0, "low": 0.9, "high": 1.2}
    >>> plt.close(published(pd.DataFrame([row]), inflation=1.0))
    """
    groups = beside.groupby("data", sort=False)
    figure, axes = plt.subplots(1, len(groups), figsize=(10, 4), squeeze=False)
    for ax, (name, t) in zip(axes[0], groups, strict=True):
        depth, width = (t[column].map("{:.0f}".format) for column in ("depth", "width"))
        place = np.arange(len(t))
        error = [t["ours"] - t["low"], t["high"] - t["ours"]]
        colour = ROLES["measured"]["color"]
        ax.errorbar(t["ours"], place, xerr=error, label="ours", fmt="o", color=colour)
        label, colour = f"published / {inflation:g}", ROLES["control"]["color"]
        ax.plot(t["published"], place, "D", label=label, color=colour)
        ax.set_yticks(place, "depth " + depth + ", width " + width)
        ax.set(title=name, xlabel="mean absolute deviation of the losses [nat]", xscale="log")
    axes[0][0].legend(fontsize=8)
    return figure


def rules(check: pd.DataFrame) -> Figure:
    """How often an order of held-out examples strays after the size that a rule gives.

    check  rows "check" of sample_size.csv of all runs

    >>> row = {"criterion": "surface", "tolerance": 0.1, "k": 50, "confidence": 0.9}
    >>> row |= {"failures": 0.05, "failures_low": 0.0, "failures_high": 0.1}
    >>> plt.close(rules(pd.DataFrame([row])))
    """
    names = list(check["criterion"].unique())
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    by_tolerance = check.groupby("tolerance")
    shape = {"figsize": (10.5, 3.6), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(by_tolerance), **shape)
    for ax, (tau, group) in zip(axes[0], by_tolerance, strict=True):
        for rule, t in group.groupby("criterion", sort=False):
            error = [t["failures"] - t["failures_low"], t["failures_high"] - t["failures"]]
            look = {"fmt": "o", "markersize": 4, "capsize": 2, "color": colours[rule]}
            ax.errorbar(t["k"], t["failures"], yerr=error, label=rule, **look)
        ax.axhline(1 - check["confidence"].iloc[0], label="allowed", **ROLES["bound"])
        ax.set(xscale="log", xlabel="k of the rule [held-out samples]")
        few_decades(ax.xaxis)
        ax.set_title(f"tolerance {tau:g} nat")
    axes[0][0].set_ylabel("share of the orders that stray")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=8, loc="outside lower center", ncols=len(names) + 1)
    return figure
