"""The table of findings, claim by claim."""

import math

import pandas as pd

from utils.report.findings import Findings


def test_norms_and_bounds():
    findings = Findings()
    parts = ["training", "training", "held-out"]
    findings.norms(pd.DataFrame({"part": parts, "value": [1.0, 3.0, 5.0]}))
    rungs = ["loose", "loose", "wrong", "certified"]
    findings.bounds(
        pd.DataFrame({"rung": rungs, "ratio": [2.0, 4.0, 0.5, 1.01]}),
        ["loose", "wrong", "certified"],
    )
    table = findings.table()
    assert list(table["value"]) == [2.0, 5.0, 3.0, 0.5, 1.01]
    assert list(table["verdict"][2:]) == ["holds", "violated", "width of the interval"]
    assert tuple(table.loc[0, ["low", "high"]]) == (1.0, 3.0) and math.isnan(table.loc[0, "theory"])


def test_the_values_block_is_judged_for_one_block_alone():
    shares = {"always": (1.0, 0.6, 1.0), "sometimes": (0.5, 0.1, 0.9)}
    words = []
    for one_block in (True, False):
        findings = Findings()
        findings.values_block(shares, one_block)
        words.append(list(findings.table()["verdict"]))
    assert words == [["no violation seen", "violated"], ["measured", "measured"]]


def test_pooled_claims():
    row = {"claim": "a", "whose": "thm:x without its remainder", "value": 0.5, "low": 0.4}
    row |= {"high": 0.6, "theory_low": 0.0, "theory_high": 1.0, "verdict": "holds"}
    row |= {"trials": 3, "runs": 2, "control": "c"}
    one = row | {"whose": "prop:y", "low": 0.5, "high": 0.5, "theory_high": math.nan}
    findings = Findings()
    findings.pooled(pd.DataFrame([row, one]))
    first, second = findings.table().to_dict("records")
    assert first["quantity"] == "a (without its remainder)" and first["theory"] == 1.0
    assert first["source"] == "05, verdicts.csv; thm:x without its remainder; runs: 2"
    assert math.isnan(second["low"]) and second["theory"] == 0.0 and second["quantity"] == "a"


def test_architectures_and_published_values():
    nan = math.nan
    rows = {"quantity": "S", "architecture": ["b", "c", "d"], "ratio": [1.0, 2.0, 2.0]}
    findings = Findings()
    findings.architectures(
        pd.DataFrame(rows | {"low": [0.9, 1.5, nan], "high": [1.1, 3, nan]}), "a"
    )
    words = ["no difference seen", "differs", "one seed"]
    assert list(findings.table()["verdict"]) == words
    assert findings.table()["quantity"].iloc[0] == "S, b / a"
    place = {"data": "mnist", "depth": 1.0, "width": 8.0}
    numbers = {"ours": 1.0, "low": 0.5, "high": 2.0, "published": 0.5, "verdict": "agrees"}
    findings.published(pd.DataFrame([place | numbers]))
    last = findings.table().iloc[-1]
    assert tuple(last[["value", "low", "high"]]) == (2.0, 1.0, 4.0)
    findings.published(pd.DataFrame())
    assert len(findings.table()) == 4


def test_sizes_and_rules():
    pilot = {"criterion": "surface", "tolerance": 0.1, "k": [10, 30], "lower": [5, 6]}
    pilot |= {"upper": [50, 60], "verdict": ["enough", "more"]}
    check = {"criterion": ["surface", "surface"], "failures": [0.1, 0.3], "confidence": 0.9}
    check |= {"failures_low": [0.0, 0.2], "failures_high": [0.2, 0.4]}
    findings = Findings()
    findings.sizes(pd.DataFrame(pilot), pd.DataFrame(check | {"verdict": ["kept", "broken"]}))
    size, rule = findings.table().to_dict("records")
    assert (size["value"], size["low"], size["high"]) == (20.0, 5.0, 60.0)
    assert size["quantity"] == "k, surface, tau = 0.1" and size["verdict"] == "enough, more"
    assert (rule["value"], rule["low"], rule["verdict"]) == (0.3, 0.2, "broken")
    assert round(rule["theory"], 12) == 0.1
