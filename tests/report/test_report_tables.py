"""The tables of the study report on runs that are known."""

import numpy as np
import pandas as pd
import pytest

from utils.report import tables
from utils.report.over_runs import over_seeds, ratios_to_first, share_interval


@pytest.fixture
def about():
    row = {"data": "digits", "depth": 1.0, "width": 8.0, "heads": 2.0, "norm": "pre", "l2": 0.1}
    runs = [row | {"run": f"a{seed}", "seed": seed} for seed in range(3)]
    deep = row | {"depth": 2.0}
    runs += [deep | {"run": f"b{seed}", "seed": seed} for seed in range(3)]
    frame = pd.DataFrame(runs)
    return frame[["run", *frame.columns.drop("run")]].assign(gpu="", threshold=np.nan)


def test_what_runs_share_and_in_what_they_differ(about):
    shared, varies = tables.shared_and_varying(about)
    assert varies == ["depth", "seed"]
    assert shared == ["data digits", "width 8", "heads 2", "norm pre", "l2 0.1"]


def test_architectures_in_words(about):
    labels = tables.architectures(about, ["depth", "seed"])
    assert labels["a0"] == labels["a2"] == "depth 1, width 8, 2 heads, pre-norm"
    full = tables.architectures(about, ["data", "l2"])
    assert full["b0"] == "digits, depth 2, width 8, 2 heads, pre-norm, lambda 0.1"
    own = about.assign(depth=np.nan, norm="")
    assert tables.architectures(own, [])["a0"] == "own network"


def test_medians_over_runs(about):
    labels = tables.architectures(about, [])
    values = pd.Series(dict(zip(about["run"], [1.0, 2.0, 6.0, 3.0, 3.0, 3.0])))
    table = tables.medians_over_runs({"norm": values, "few": values[:3]}, labels)
    assert list(table["norm"]) == ["2 [1, 6]", "3"] and list(table["few"]) == ["2 [1, 6]", ""]


def constant_rows(about, values):
    place = {"experiment": "constant", "weights": "trained", "k": 10}
    return pd.DataFrame(
        [
            place | {"run": run, "quantity": quantity, "value": value * factor}
            for run, value in zip(about["run"], values)
            for quantity, factor in (("S", 1.0), ("M", 100.0))
        ]
    )


def test_constants_by_architecture_and_relative(about):
    labels, seeds = tables.architectures(about, []), dict(zip(about["run"], about["seed"]))
    values = [1.0, 2.0, 3.0, 2.2, 3.9, 6.1]
    rows = constant_rows(about, values)
    noise = rows.assign(weights="untrained", value=9.0)
    sizes = [4, 3, 5, 4, 4, 4]
    norms = pd.DataFrame(
        [
            {"run": run, "part": "training", "value": value + i}
            for run, value, size in zip(about["run"], values, sizes)
            for i in range(size)
        ]
    )
    found, fewest = tables.constants(pd.concat([rows, noise]), norms, labels, seeds)
    assert fewest == 3 and len(found) == 12
    largest = found[found["quantity"] == "M"].set_index("run")["value"]
    assert list(largest) == [value + 2 for value in values]  # of as many examples in every run
    table = tables.constants_by_architecture(found)
    mean, low, high = over_seeds(pd.Series(values[:3]), pd.Series([0, 1, 2]))
    assert table["S"].iloc[0] == f"{mean:.3g} [{low:.3g}, {high:.3g}]"
    assert list(table.columns) == ["S", "M"] and list(table.index.get_level_values(1)) == [3, 3]
    relative = tables.relative_constants(found)
    logs = pd.DataFrame(np.log([values[:3], values[3:]]), columns=[0, 1, 2])
    expected = ratios_to_first(logs, 1 - 0.05 / 2).iloc[0]
    assert tuple(relative.iloc[0][["ratio", "low", "high"]]) == pytest.approx(tuple(expected[:3]))
    assert list(relative["quantity"]) == ["S", "M"]


def test_attention_blocks_and_what_they_say():
    rows = [
        {"run": run, "weights": weights, "row": f"{a} {layer}", "column": f"{b} {other}"}
        | {"value": value * (2 if weights == "trained" else 1)}
        for run in ("a", "b")
        for weights in ("untrained", "trained")
        for layer in (0, 1)
        for other in (0, 1)
        for (a, b), value in {("V", "V"): 3.0, ("Q", "Q"): 4.0 - layer * 2, ("Q", "V"): 1.0}.items()
    ]
    rows.append({"run": "a", "weights": "trained", "row": "head", "column": "head", "value": 9.0})
    sides = tables.attention_blocks(pd.DataFrame(rows))
    assert set(sides) == {"VV", "QQ", "QV"} and len(sides) == 8
    assert sides.loc[("a", 1, "trained"), "QQ"] == 4.0
    counts = tables.values_block(sides)
    assert list(counts.values()) == [(2, 4), (2, 4), (4, 4)]
    assert tables.attention_blocks(pd.DataFrame(rows[-1:])).empty


def test_violations_count_each_seed_once():
    values = {
        "measured": [2.0, 2.0, 2.0],
        "published": [1.0, 3.0, 1.0],
        "proved": [np.inf, 3.0, 3.0],
    }
    rows = [
        {"run": run, "radius": 0.1, "quantity": quantity, "value": value}
        for i, run in enumerate("abc")
        for quantity, column in values.items()
        for value in column[i : i + 1]
    ]
    seeds = {"a": 0, "b": 0, "c": 1}
    shares, bands = tables.violations_by_radius(pd.DataFrame(rows), ["published", "proved"], seeds)
    assert shares.loc[0.1, "published"] == pytest.approx(2 / 3) and shares.loc[0.1, "steps"] == 3
    assert shares.loc[0.1, "proved"] == 0.0  # of the two that have a bound
    assert bands["published"] == [pytest.approx(share_interval(1.5, 2))]


def test_deviations_are_exact_at_the_last_k():
    rows = {"run": ["a", "a", "b"], "k": [5, 9, 9], "theory_low": [0.3, 0.2, 0.1]}
    place = {"experiment": "one step", "weights": "trained", "quantity": "mean"}
    found = tables.deviations(pd.DataFrame(rows).assign(**place))
    assert found.to_dict() == pytest.approx({"a": 2.0, "b": 1.0})
