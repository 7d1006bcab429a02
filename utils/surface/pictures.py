"""The figures of notebook 05 that show curves; those of the loss surface itself are in `plane`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.figures import ROLES, band
from utils.surface.inequalities import TERMS
from utils.surface.intervals import binomial_interval
from utils.surface.measured import rms_of
from utils.surface.verdicts import Slope

LOOKS = ("measured", "control", "tighter", "bound")
SAMPLES = "k [samples]"
DISTANCE = "distance from w0 [fraction of |w0|]"


def _rms(ax: Axes, table: pd.DataFrame, role: str, label: str) -> pd.DataFrame:
    rms = rms_of(table)
    ax.loglog(rms["k"], rms["value"], label=label, **ROLES[role])
    band(ax, rms["k"], rms["low"], rms["high"], role)
    return rms


def one_step(tables: Mapping[str, pd.DataFrame], n_orders: int) -> Figure:
    """The mean change by one example for up to four lists, and its rms over the exact one.

    tables    of `measure_steps`, by list; the first has a band
    n_orders  over which was averaged [1]

    >>> from utils.surface.measured import measure_steps
    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> table = measure_steps([1.0, 2.0, 4.0], orders, np.array([1, 2]))
    >>> plt.close(one_step({"trained": table}, 2))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=85)
    for (name, table), role in zip(tables.items(), LOOKS):
        look = ROLES[role]
        mean = table[table["quantity"] == "mean"]
        rms = rms_of(table)
        slope = Slope.of(table).value
        left.loglog(mean["k"], mean["value"], label=f"{name}: {slope:.2f}", **look)
        ends = mean["theory_low"], mean["theory_high"]
        left.fill_between(mean["k"], *ends, color=look["color"], alpha=0.2)
        right.semilogx(rms["k"], rms["ratio"], label=name, **look)
        if role == "measured":
            low, high = (rms[end] / rms["theory_low"] for end in ("low", "high"))
            band(right, rms["k"], low, high, role)
    right.axhline(1, **ROLES["reference"])
    left.set(xlabel=SAMPLES, ylabel="mean of $|L_{k+1} - L_k|$ [nat]")
    left.set_title(f"One step (shade: proved bracket; {n_orders} orders)")
    right.set(xlabel=SAMPLES, ylabel="measured rms / exact rms")
    right.set_title(r"Against the exact $S/\sqrt{k(k+1)}$ (band: trained)")
    left.legend(title="slope of the rms", fontsize=7.5, loc="upper right")
    right.legend(fontsize=8)
    return figure


def smoothing(k: np.ndarray, pure: np.ndarray, smooth: np.ndarray, factor: float) -> Figure:
    """A pure power, and what exponential smoothing makes of it.

    k       (points,) sizes [examples]
    pure    (points,) the power
    smooth  (points,) after the filter
    factor  of the filter [1]

    >>> k = np.array([1.0, 2.0])
    >>> plt.close(smoothing(k, 1 / (k + 1), 1 / k, 0.9))
    """
    figure, ax = plt.subplots(figsize=(7, 3.4))
    ax.loglog(k, pure, label="1/(k+1)", **ROLES["measured"] | {"marker": ""})
    ax.loglog(k, smooth, label=f"smoothed, factor {factor}", **ROLES["bound"])
    ax.set(xlabel=SAMPLES, ylabel="value [1]")
    ax.set_title("A pure 1/(k+1), and what the filter makes of it")
    ax.legend()
    return figure


def distance(
    tables: Mapping[str, pd.DataFrame], controls: Mapping[str, pd.DataFrame], n_orders: int
) -> Figure:
    """The distance to the limit beside its exact value.

    tables    of `measure_distance`, by name
    controls  up to two more, without a theory
    n_orders  over which was averaged [1]

    >>> from utils.surface.measured import measure_distance
    >>> orders = np.array([[0, 1, 2], [2, 0, 1]])
    >>> table = measure_distance([1.0, 2.0, 4.0], orders, np.array([1, 2]))
    >>> plt.close(distance({"trained": table}, {"sorted": table}, 2))
    """
    figure, ax = plt.subplots(figsize=(7, 3.9))
    for (name, table), role in zip(tables.items(), LOOKS):
        rms = _rms(ax, table, role, name)
        label = "exact" if role == "measured" else None
        ax.plot(rms["k"], rms["theory_low"], **ROLES["bound"], label=label)
    for (name, table), dash in zip(controls.items(), ((1, 1), (4, 1, 1, 1))):
        rms = rms_of(table)
        ax.plot(rms["k"], rms["value"], label=name, color="0.3", linestyle=(0, dash))
    ax.set(xlabel=SAMPLES, ylabel="root mean square distance [nat]")
    ax.set_title(f"Distance to the limit ({n_orders} orders)")
    ax.legend(fontsize=8)
    return figure


def closed_forms(forms: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Closed forms for quadratic losses over forward passes.

    forms   rows of `closed_form_ratios` with a column `weights`
    titles  by kind of weights

    >>> columns = {"weights": ["all", "top"], "sigma": 0.1, "error": 0.1}
    >>> forms = pd.DataFrame(columns | {"with": 1.0, "without": 0.5})
    >>> plt.close(closed_forms(forms, {"all": "all weights", "top": "leading eigenvectors"}))
    """
    figure, axes = plt.subplots(1, len(titles), figsize=(9.5, 3.4), sharey=True, dpi=80)
    for ax, (kind, t) in zip(axes, forms.groupby("weights", sort=False), strict=True):
        for column, role in (("with", "measured"), ("without", "bound")):
            label = f"{column} the gradient term"
            ax.loglog(t["sigma"], t[column], label=label, **ROLES[role])
        low = t["with"] * (1 - t["error"]).clip(lower=0.05)
        band(ax, t["sigma"], low, t["with"] * (1 + t["error"]))
        ax.axhline(1, **ROLES["reference"])
        ax.set(xlabel="sigma [units of weight]", title=titles[kind], ylim=(0.4, 30))
    axes[0].set_ylabel("closed form / forward passes")
    axes[0].legend(fontsize=8, loc="upper left")
    return figure


def one_step_ball(ball: pd.DataFrame, violated: pd.DataFrame) -> Figure:
    """The terms of the one-step theorem over the distance, and how often the inequality fails.

    ball      the first of `pairs_on_balls`
    violated  of `violations`

    >>> columns = dict.fromkeys([*TERMS, "measured", "first form", "published"], 1.0)
    >>> ball = pd.DataFrame(columns | {"pair": [0, 1], "fraction": 0.1})
    >>> forms = ("proved", "second form", "first form", "published")
    >>> plt.close(one_step_ball(ball, pd.DataFrame({form: [False, True] for form in forms})))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=85)
    pairs = ball["pair"].nunique()
    groups = ball.groupby("fraction")
    radii = sorted(groups.groups)
    lines = {
        "measured": ("measured, worst point (band: all pairs)", ROLES["measured"]),
        "first form": ("first form (with the gradient term)", ROLES["tighter"]),
        "published": ("published (without it)", ROLES["bound"]),
    }
    for term, dash in zip(TERMS, ((1, 1), (5, 1), (3, 1, 1, 1))):
        look: dict[str, Any] = {"color": "0.55", "linestyle": (0, dash), "linewidth": 1}
        lines[term] = f"{term} term", look
    for column, (label, look) in lines.items():
        left.loglog(radii, groups[column].median(), label=label, **look)
    band(left, radii, groups["measured"].min(), groups["measured"].max())
    left.set(xlabel=DISTANCE, ylabel="$(k+1)\\,|L_{k+1} - L_k|$ [nat]")
    left.set_title(f"Terms of the one-step theorem (median of {pairs})")
    left.legend(fontsize=7.5)
    for form, role in zip(("proved", "second form", "first form", "published"), LOOKS):
        hits = violated[form].groupby(ball["fraction"]).sum()
        right.semilogx(radii, hits / pairs, label=form, **ROLES[role] | {"marker": "o"})
        if form in ("published", "proved"):  # of the two that are compared
            low, high = np.transpose([binomial_interval(h, pairs) for h in hits])
            band(right, radii, low, high, role)
    right.set(xlabel=DISTANCE, ylabel="share of the pairs", ylim=(-0.03, 1.03))
    right.set_title(f"How often the inequality fails (n = {pairs}; bands: 95 %)")
    right.legend(fontsize=8)
    return figure


def hessian_norms(
    tables: Mapping[str, pd.DataFrame],
    squares: Mapping[str, np.ndarray],
    orthogonal: Mapping[str, np.ndarray],
    titles: Mapping[str, str],
) -> Figure:
    """Norms of differences of Hessians: every order, their rms, and its bound where there is one.

    tables      of `table_of`, by matrix
    squares     (n_orders, points), by matrix [nat^2/w^4]
    orthogonal  (points,) mean squares if the Hessians were orthogonal [nat^2/w^4]
    titles      by matrix

    >>> from utils.surface.measured import table_of
    >>> k, ones = np.array([1, 2]), np.ones(2)
    >>> tables = {m: table_of(k, (ones, ones, ones), (-1.0, -1.1, -0.9, -1.0)) for m in "ab"}
    >>> squares = {m: np.ones((3, 2)) for m in "ab"}
    >>> plt.close(hessian_norms(tables, squares, {m: ones for m in "ab"}, {m: m for m in "ab"}))
    """
    figure, axes = plt.subplots(1, len(tables), figsize=(9.5, 3.6), dpi=80)
    for ax, (matrix, table) in zip(axes, tables.items(), strict=True):
        n_orders = len(squares[matrix])
        label = f"rms of {n_orders} orders, slope {Slope.of(table).value:.2f}"
        rms = _rms(ax, table, "measured", label)
        ax.loglog(rms["k"], np.sqrt(squares[matrix]).T, color="0.8", linewidth=0.6, zorder=1)
        exact = np.sqrt(orthogonal[matrix])
        ax.plot(rms["k"], exact, label="if the h_i were orthogonal", **ROLES["reference"])
        if rms["theory_high"].notna().any():
            ax.plot(rms["k"], rms["theory_high"], label="2M/(k+1)", **ROLES["bound"])
        ax.set(xlabel=SAMPLES, ylabel="spectral norm [nat/w²]", title=titles[matrix])
        ax.legend(fontsize=8, loc="lower left")
    return figure


def retrained(
    table: pd.DataFrame, labels: Mapping[str, str], limits: Mapping[str, float], n: int
) -> Figure:
    """What was measured of networks trained anew on the first k examples.

    table   rows of `retrain` with a column `init`
    labels  of the axes, by quantity
    limits  of some quantities, at the weights trained on all
    n       how many these are [examples]

    >>> table = pd.DataFrame({"init": 0, "k": [1, 2], "excess": [2.0, 1.0], "norm": [1.0, 1.0]})
    >>> labels = {"excess": "excess [nat]", "norm": "norm [nat/w²]"}
    >>> plt.close(retrained(table, labels, {"norm": 1.0}, n=4))
    """
    figure, axes = plt.subplots(1, len(labels), figsize=(12, 3.0))
    for ax, (quantity, label) in zip(axes, labels.items(), strict=True):
        values = table.pivot(index="init", columns="k", values=quantity)
        ax.plot(values.columns, values.T, color="0.7", linewidth=0.8)
        mean = values.mean()
        ax.plot(mean.index, mean, label=f"mean of {len(values)}", **ROLES["measured"])
        if quantity in limits:
            ax.axhline(limits[quantity], label=f"at w_n (n = {n})", **ROLES["reference"])
        ax.set(xlabel=SAMPLES, title=label, xticks=mean.index, ylim=(0, None))
        ax.legend(fontsize=7.5)
    return figure
