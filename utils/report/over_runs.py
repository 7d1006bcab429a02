"""From single runs to a study: what counts as independent are seeds, since runs of one seed share
their random orders."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.stats import beta
from scipy.stats import t as student

from utils.surface.intervals import Estimate
from utils.surface.verdicts import verdict


def over_seeds(values: pd.Series, seeds: pd.Series, level: float = 0.95) -> Estimate:
    """Mean over seeds with its t interval; runs of one seed count as one.

    values  one a run
    seeds   of the runs
    level   of the interval [1]

    Returns mean, low and high; nan for the ends of fewer than 3 seeds.

    >>> over_seeds(pd.Series([1.0, 3.0, 4.0]), pd.Series([0, 0, 1]))
    (3.0, nan, nan)
    """
    means = values.groupby(seeds.to_numpy()).mean()
    mean = means.mean().item()
    if len(means) < 3:
        return mean, math.nan, math.nan
    quantile = student.ppf((1 + level) / 2, len(means) - 1)
    half = quantile * means.std(ddof=1) / math.sqrt(len(means))
    return mean, mean - half, mean + half


def share_interval(hits: float, trials: float, miss: float = 0.05) -> tuple[float, float]:
    """The binomial interval of a share (Clopper and Pearson 1934), for fractions of trials too.

    hits    how many of the trials [1]
    trials  how many in all [1]
    miss    probability that the interval leaves out the share, at most [1]

    >>> low, high = share_interval(0, 10)
    >>> low, round(high, 3)
    (0.0, 0.308)
    """
    misses = trials - hits
    low = beta.ppf(miss / 2, hits, misses + 1) if hits > 0 else 0.0
    high = beta.ppf(1 - miss / 2, hits + 1, misses) if misses > 0 else 1.0
    return float(low), float(high)


def shares_over_seeds(runs: pd.DataFrame) -> Estimate:
    """Share of hits over runs with its 95 % binomial interval.

    Runs of one seed together count as one: hits and trials are means over them.

    runs  a row a run, with columns value (its share), trials and seed

    >>> runs = pd.DataFrame({"value": [0.5, 1.0], "trials": [2, 2], "seed": [0, 1]})
    >>> shares_over_seeds(runs)[0].item()
    0.75
    """
    hits = runs["value"] * runs["trials"]
    by_seed = runs.assign(hits=hits).groupby("seed")[["hits", "trials"]].mean()
    total = by_seed.sum()
    share = total["hits"] / total["trials"]
    return share, *share_interval(total["hits"], total["trials"])


def ratios_to_first(logs: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Ratio of each architecture to the first, with its t interval.

    Least squares with an effect of each row and of each seed and one residual variance for all: few
    seeds of one architecture say little about its variance alone. A row may lack seeds (nan); a
    seed that one row alone has tells nothing.

    logs   logarithms, a row an architecture and a column a seed
    level  of the intervals [1]

    Returns a row an architecture but the first: ratio, low, high, and seeds, how many it has. Of
    one seed there is no interval, and no ratio of rows that no seed connects.

    >>> ratios_to_first(pd.DataFrame([[0.0, 1.0], [2.0, 3.0]]))["ratio"].round(3).tolist()
    [7.389]
    """
    rows, columns = logs.shape
    row, column = np.nonzero(logs.notna().to_numpy())  # one entry a run
    y = logs.to_numpy()[row, column]
    design = np.zeros((len(y), rows + columns))
    design[np.arange(len(y)), row] = 1
    design[np.arange(len(y)), rows + column] = 1
    contrast = np.eye(rows - 1, rows + columns, 1)
    contrast[:, 0] = -1
    gram = design.T @ design
    inverse = np.linalg.pinv(gram)
    fitted = inverse @ (design.T @ y)
    freedom = len(y) - np.linalg.matrix_rank(design)
    half = math.nan
    if freedom > 0:
        variance = np.square(y - design @ fitted).sum() / freedom
        errors = np.sqrt(variance * np.einsum("ij,jk,ik->i", contrast, inverse, contrast))
        half = student.ppf((1 + level) / 2, freedom) * errors
    known = np.abs(contrast @ inverse @ gram - contrast).max(1, initial=0) < 1e-9
    difference = np.where(known, contrast @ fitted, math.nan)
    ends = {"ratio": difference, "low": difference - half, "high": difference + half}
    ratios = np.exp(pd.DataFrame(ends, logs.index[1:]))
    return ratios.assign(seeds=logs.notna().sum(axis=1)[1:])


def _pooled_deviation(groups: pd.DataFrame) -> tuple[float, float]:
    """One standard deviation for all groups (columns count, var), and its degrees of freedom."""
    freedom = (groups["count"] - 1).sum()
    if freedom == 0:
        return math.nan, freedom
    squares = (groups["var"].fillna(0) * (groups["count"] - 1)).sum()
    return math.sqrt(squares / freedom), freedom


def beside_published(
    ours: pd.DataFrame, published: pd.DataFrame, inflation: float = 1.0
) -> pd.DataFrame:
    """Published values of single runs beside ours, with the interval of one more run of ours.

    The 95 % prediction interval takes log(ours) as normal with one variance for all architectures
    of a data set: exp(mean +- t s sqrt(1 + 1/seeds)). Without two seeds of some architecture there
    is none, and the verdict is "cannot tell".

    ours       a row a run: data, depth, width, ours
    published  a row a value: data, depth, width, value
    inflation  by which a published value is divided [1]

    Returns a row a published value that we have: data, depth, width, seeds, ours (geometric mean
    over seeds), low, high, published, verdict.

    >>> ours = pd.DataFrame({"data": "a", "depth": 1, "width": 8, "ours": [0.9, 1.1]})
    >>> published = pd.DataFrame({"data": ["a"], "depth": [1], "width": [8], "value": [1.0]})
    >>> beside_published(ours, published)["verdict"].item()
    'agrees'
    """
    keys = ["data", "depth", "width"]
    logs = ours.assign(log=np.log(ours["ours"])).groupby(keys)["log"].agg(["mean", "count", "var"])
    rows = []
    for value in published.to_dict("records"):
        key = tuple(value[name] for name in keys)
        if key not in logs.index:
            continue
        mean, seeds, _ = logs.loc[key]
        deviation, freedom = _pooled_deviation(logs.loc[value["data"]])
        half = student.ppf(0.975, freedom) * deviation * math.sqrt(1 + 1 / seeds)
        low, middle, high = np.exp([mean - half, mean, mean + half]).tolist()
        theirs = value["value"] / inflation
        row = dict(zip(keys, key)) | {"seeds": int(seeds), "ours": middle, "low": low, "high": high}
        rows.append(row | {"published": theirs, "verdict": verdict(low, high, theirs)})
    return pd.DataFrame(rows)


def _pooled_numbers(runs: pd.DataFrame, how: str) -> Estimate:
    """Value, low and high of one claim over its runs."""
    if how == "counts":
        return shares_over_seeds(runs)
    if how in ("largest", "range"):
        values = runs["value"]
        value = values.max() if how == "largest" else values.median()
        return value, runs["low"].min(), runs["high"].max()
    value, low, high = over_seeds(runs["value"], runs["seed"])
    if math.isnan(low):
        return value, runs["low"].mean(), runs["high"].mean()
    return value, low, high


def _pooled_word(
    runs: pd.DataFrame, how: str, low: float, high: float, theory: tuple[float, float]
) -> str:
    """Verdict on one claim over its runs."""
    given = list(dict.fromkeys(runs["verdict"]))
    if "violated" in given or (how == "counts" and low > theory[1]):
        return "violated"
    if how == "seeds" and set(given) <= {"agrees", "differs", "proves nothing", "cannot tell"}:
        word = verdict(low, high, *theory)
        return "proves nothing" if word == "agrees" and not runs["control_failed"].all() else word
    if "holds" in given:
        given = [word for word in given if word != "proves nothing"]
    return ", ".join(given)


def pooled_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of many runs as one row a claim.

    The column `pooled` says how. "seeds": `over_seeds` (of fewer than 3 seeds the mean interval)
    and the verdict taken anew; "proves nothing" unless the control failed in every run. "counts":
    `shares_over_seeds`. "largest": the largest value. "range": the median, from the least low to
    the greatest high. A bound violated in one run is violated, a share whose interval lies above
    its bound too; a bound kept in all runs holds if its control failed in one. Other verdicts are
    listed.

    table  rows of verdicts.csv with columns `run` and `seed`

    Returns claim, whose, value, low, high, theory_low, theory_high, verdict, trials (in all), runs
    (how many), control (of the first run).

    >>> row = {"claim": "a slope", "whose": "prop:rate", "run": "a", "seed": 0, "control": "c"}
    >>> row |= {"pooled": "seeds", "trials": 0, "verdict": "agrees", "control_failed": True}
    >>> row |= {"value": -1.0, "low": -1.1, "high": -0.9, "theory_low": -1.0, "theory_high": -1.0}
    >>> pooled_verdicts(pd.DataFrame([row]))["verdict"].item()
    'agrees'
    """
    rows = []
    for text, runs in table.groupby("claim", sort=False):
        how = runs["pooled"].iloc[0]
        control = runs["control"].iloc[0]
        if control and len(runs) > 1:
            control = f"{runs['run'].iloc[0]}: {control}"
        theory = runs["theory_low"].mean(), runs["theory_high"].mean()
        value, low, high = _pooled_numbers(runs, how)
        row = {"claim": text, "whose": runs["whose"].iloc[0]}
        row |= {"value": value, "low": low, "high": high}
        row |= {"theory_low": theory[0], "theory_high": theory[1]}
        row |= {"verdict": _pooled_word(runs, how, low, high, theory)}
        row |= {"trials": int(runs["trials"].sum()), "runs": len(runs), "control": control}
        rows.append(row)
    return pd.DataFrame(rows)
