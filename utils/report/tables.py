"""The tables of notebook 07: what the runs of a study have in common, and what they found apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from utils.report.over_runs import over_seeds, ratios_to_first, shares_over_seeds
from utils.surface import inequalities
from utils.surface.verdicts import with_interval


def shared_and_varying(about: pd.DataFrame) -> tuple[list[str], list[str]]:
    """What all runs share, as text, and the columns in which they differ.

    about  runs.csv, its first column the name

    >>> shared_and_varying(pd.DataFrame({"run": ["a", "b"], "seed": [0, 1], "depth": [2, 2]}))
    (['depth 2'], ['seed'])
    """
    varies = [name for name in about.columns[1:] if about[name].nunique() > 1]
    shared = []
    for name, value in about.iloc[0, 1:].drop(varies).items():
        number = f"{value:.4g}" if isinstance(value, float) else str(value)
        if number not in ("", "nan"):
            shared.append(f"{name} {number}")
    return shared, varies


def architectures(about: pd.DataFrame, varies: list[str]) -> dict[str, str]:
    """The architecture of each run in words, by run.

    about   runs.csv
    varies  the columns in which the runs differ

    >>> row = {"run": ["a"], "depth": [2.0], "width": [8.0], "heads": [2.0], "norm": ["pre"]}
    >>> architectures(pd.DataFrame(row), [])
    {'a': 'depth 2, width 8, 2 heads, pre-norm'}
    """
    labels = {}
    for row in about.itertuples():
        own = np.isnan(row.depth)
        parts = [row.data] if "data" in varies else []
        parts += ["own network" if own else f"depth {row.depth:.0f}, width {row.width:.0f}"]
        parts += [f"{row.heads:.0f} heads, {row.norm}-norm"] if row.norm else []
        parts += [f"lambda {row.l2:g}"] if "l2" in varies else []
        labels[row.run] = ", ".join(parts)
    return labels


def medians_over_runs(columns: Mapping[str, pd.Series], labels: Mapping[str, str]) -> pd.DataFrame:
    """By architecture the median over the runs, as text with their range.

    columns  by name, a number a run, indexed by run
    labels   the architecture by run

    >>> values = {"norm": pd.Series({"a": 1.0, "b": 3.0})}
    >>> medians_over_runs(values, {"a": "depth 1", "b": "depth 1"})["norm"].item()
    '2 [1, 3]'
    """
    by_run = pd.DataFrame(columns).groupby(lambda run: labels[run], sort=False)
    middle, low, high = by_run.median(), by_run.min(), by_run.max()
    ends = low.map(" [{:.3g}, ".format) + high.map("{:.3g}]".format)
    cells = middle.map("{:.3g}".format) + ends.where(low < high, "")
    cells = cells.where(middle.notna(), "").rename_axis("architecture")
    kinds = dict.fromkeys(labels.values())
    return cells.loc[[kind for kind in kinds if kind in cells.index]]


def attention_blocks(blocks: pd.DataFrame) -> pd.DataFrame:
    """Norms of the blocks of H_k between query, key and value weights of one layer.

    blocks  blocks.csv of all runs

    Returns a row a run, layer and weights, a column a pair: "VV", "QK", ..

    >>> row = {"run": "a", "weights": "trained", "row": "V 0", "column": "V 0", "value": 2.0}
    >>> attention_blocks(pd.DataFrame([row]))["VV"].item()
    2.0
    """
    sides = [blocks[side].str.extract(r"^([QKV]) (\d+)") for side in ("row", "column")]
    same_layer = sides[0][1].notna() & (sides[0][1] == sides[1][1])
    pair, layer = sides[0][0] + sides[1][0], sides[0][1]
    inside = blocks.assign(block=pair, layer=layer)[same_layer].astype({"layer": int})
    keys = ["run", "layer", "weights"]
    return inside.pivot_table(index=keys, columns="block", values="value")


def values_block(sides: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Three statements of "Closing the Curvature Gap" on the values' block: hits and trials.

    sides  of `attention_blocks`, untrained and trained

    >>> index = pd.MultiIndex.from_product([["a"], [0], ["untrained", "trained"]])
    >>> index.names = ["run", "layer", "weights"]
    >>> list(values_block(pd.DataFrame({"VV": [1.0, 2.0], "QQ": [3.0, 1.0]}, index)).values())
    [(0, 1), (1, 1), (1, 1)]
    """
    largest = (sides["VV"] >= sides.max(axis=1)).groupby("weights").agg(["sum", "count"])
    pair = sides["VV"].unstack("weights")
    grows = pair["trained"] > pair["untrained"]
    counts = {}
    for weights in ("untrained", "trained"):
        text = f"values' block is the largest of the attention's, {weights}"
        counts[text] = tuple(largest.loc[weights].tolist())
    return counts | {"values' block grows with training": (int(grows.sum()), len(grows))}


def violations_by_radius(
    ball: pd.DataFrame, forms: list[str], seeds: Mapping[str, int]
) -> tuple[pd.DataFrame, dict[str, list]]:
    """How often the inequalities over a ball fail, by radius.

    ball   rows "ball" of convergence.csv of all runs
    forms  the inequalities
    seeds  by run

    Returns shares (radii, forms) with a column `steps`, how many; and by form the 95 % intervals of
    the radii, which count each seed once.

    >>> row = {"run": "a", "radius": 0.1, "quantity": "measured", "value": 2.0}
    >>> ball = pd.DataFrame([row, row | {"quantity": "published", "value": 1.0}])
    >>> violations_by_radius(ball, ["published"], {"a": 0})[0]["published"].item()
    1.0
    """
    first = ball[ball["quantity"] == "measured"]
    columns = ["measured", *forms]
    by_quantity = dict(list(ball.groupby("quantity")["value"]))
    table = pd.DataFrame({name: by_quantity[name].to_numpy() for name in columns})
    fails = inequalities.violations(table, forms).astype(float)
    fails = fails.where(np.isfinite(table[forms]))  # where there is a bound
    radius, run = first["radius"].to_numpy(), first["run"].to_numpy()
    shares = fails.groupby(radius).mean().rename_axis("radius")
    shares["steps"] = pd.Series(radius).value_counts().sort_index()
    by_run = fails.groupby([radius, run]).agg(["mean", "count"])
    bands = {}
    for form in forms:
        counts = by_run[form].set_axis(["value", "trials"], axis=1)
        counts["seed"] = counts.index.get_level_values(1).map(seeds)
        bands[form] = [shares_over_seeds(t)[1:] for _, t in counts.groupby(level=0)]
    return shares, bands


def constants(
    convergence: pd.DataFrame, norms: pd.DataFrame, labels: Mapping[str, str], seeds: Mapping
) -> tuple[pd.DataFrame, int]:
    """The constants of the statements at the trained weights, a row a run and constant.

    convergence  convergence.csv of all runs
    norms        per_sample_norms.csv of all runs
    labels       the architecture by run
    seeds        by run

    Returns columns run, architecture, seed, quantity, value, ..; M is the largest norm of as many
    training examples in every run, and how many these are.

    >>> row = {"run": "a", "experiment": "constant", "weights": "trained"}
    >>> convergence = pd.DataFrame([row | {"quantity": "M", "value": 1.0}])
    >>> norms = pd.DataFrame({"run": "a", "part": "training", "value": [2.0, 3.0]})
    >>> table, fewest = constants(convergence, norms, {"a": "depth 1"}, {"a": 0})
    >>> table["value"].item(), fewest
    (3.0, 2)
    """
    is_constant = convergence["experiment"] == "constant"
    table = convergence[is_constant & (convergence["weights"] == "trained")]
    table = table.assign(architecture=table["run"].map(labels), seed=table["run"].map(seeds))
    by_run = norms[norms["part"] == "training"].groupby("run")["value"]
    fewest = int(by_run.size().min())
    largest = by_run.apply(lambda values: values.iloc[:fewest].max())
    value = table["value"].mask(table["quantity"] == "M", table["run"].map(largest))
    return table.assign(value=value), fewest


def constants_by_architecture(constants: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with their t intervals, as text.

    constants  of `constants`

    Returns a row an architecture with its number of seeds, a column a constant.

    >>> row = {"architecture": "depth 1", "quantity": "S", "seed": 0, "value": 0.5}
    >>> constants_by_architecture(pd.DataFrame([row]))["S"].item()
    '0.5'
    """
    cells: dict[tuple, dict[str, str]] = {}
    for (kind, quantity), t in constants.groupby(["architecture", "quantity"], sort=False):
        place = kind, t["seed"].nunique()
        text = with_interval(*over_seeds(t["value"], t["seed"]))
        cells.setdefault(place, {})[quantity] = text
    table = pd.DataFrame.from_dict(cells, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["architecture", "seeds"])
    return table


def relative_constants(constants: pd.DataFrame) -> pd.DataFrame:
    """Each constant relative to the first architecture, with intervals for all of them together.

    Bonferroni: 95 % for every constant and architecture at once.

    constants  of `constants`

    Returns a row a constant and architecture: quantity, architecture, seeds, ratio, low, high.

    >>> row = {"architecture": "depth 1", "quantity": "S", "seed": 0, "value": 0.5}
    >>> both = pd.DataFrame([row, row | {"architecture": "depth 2", "value": 1.0}])
    >>> relative_constants(both)["ratio"].round(3).tolist()
    [2.0]
    """
    quantities = list(dict.fromkeys(constants["quantity"]))
    kinds = list(dict.fromkeys(constants["architecture"]))
    comparisons = max(1, len(quantities) * (len(kinds) - 1))
    logs = constants.assign(log=np.log(constants["value"]))
    wide = logs.pivot_table(index=["quantity", "architecture"], columns="seed", values="log")
    tables = []
    for quantity in quantities:
        ratios = ratios_to_first(wide.loc[quantity].loc[kinds], 1 - 0.05 / comparisons)
        ratios = ratios.rename_axis("architecture").reset_index()
        tables.append(ratios.assign(quantity=quantity))
    columns = ["quantity", "architecture", "seeds", "ratio", "low", "high"]
    return pd.concat(tables)[columns]


def deviations(convergence: pd.DataFrame) -> pd.Series:
    """Mean absolute deviation of the training losses by run, from the exact last step [nat].

    convergence  convergence.csv of all runs

    >>> row = {"run": "a", "experiment": "one step", "weights": "trained", "quantity": "mean"}
    >>> deviations(pd.DataFrame([row | {"k": 9, "theory_low": 0.1}])).item()
    1.0
    """
    steps = convergence[convergence["experiment"] == "one step"]
    means = steps[(steps["weights"] == "trained") & (steps["quantity"] == "mean")]
    last = means.groupby("run").tail(1).set_index("run")
    return last["theory_low"] * (last["k"] + 1)
