"""The table of findings: one row a claim, with what theory says of it and the verdict, computed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from utils.surface.verdicts import NONE, inequality, verdict


class Findings:
    """The rows of findings.csv.

    >>> findings = Findings()
    >>> findings.add("1 curvature", "03", "a norm", 2.0, verdict="measured")
    >>> findings.table()["value"].item()
    2.0
    """

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(
        self,
        question: str,
        source: str,
        quantity: str,
        value: float,
        interval: tuple[float, float] = NONE,
        theory: float = math.nan,
        verdict: str = "measured",
        control: str = "",
    ) -> None:
        """A row.

        question  which of the three
        source    notebook, file and theorem it comes from
        quantity  what the value is
        value     measured
        interval  of the value
        theory    what it says of the value
        verdict   how the two compare
        control   in words
        """
        row: dict[str, Any] = {"question": question, "quantity": quantity, "verdict": verdict}
        row |= {"control": control, "source": source, "value": float(value)}
        low, high = map(float, interval)
        self.rows.append(row | {"low": low, "high": high, "theory": float(theory)})

    def table(self) -> pd.DataFrame:
        """findings.csv."""
        return pd.DataFrame(self.rows)

    def norms(self, norms: pd.DataFrame) -> None:
        """Medians and ranges of the examples' norms.

        norms  per_sample_norms.csv of all runs
        """
        place = "1 curvature", "03, per_sample_norms.csv"
        for part in ("training", "held-out"):
            v = norms.loc[norms["part"] == part, "value"]
            text, ends = f"Hessian norm of a sample, {part}: median", (v.min(), v.max())
            self.add(*place, text, v.median(), ends, verdict="measured (range)")

    def bounds(self, bounds: pd.DataFrame, rungs: Iterable[str]) -> None:
        """Whether each rung of the ladder holds.

        bounds  bounds.csv of all runs, norms of 0 left out
        rungs   their names
        """
        for rung in rungs:
            ratio = bounds.loc[bounds["rung"] == rung, "ratio"]
            word = inequality((ratio < 1 - 1e-9).any(), slack=ratio.min())
            if rung == "certified":  # its lower end is what is measured
                word = "width of the interval"
            text, ends = f"bound / measured, {rung}: median", (ratio.min(), ratio.max())
            self.add("1 curvature", "04, bounds.csv", text, ratio.median(), ends, 1, word)

    def values_block(self, shares: Mapping[str, tuple], one_block: bool) -> None:
        """The statements of "Closing the Curvature Gap" on the values' block.

        shares     value, low and high, by statement
        one_block  all networks have one block, of which the paper speaks
        """
        place = "1 curvature", "03, blocks.csv; Closing the Curvature Gap"
        for text, (share, low, high) in shares.items():
            word = "no violation seen" if share == 1 else "violated"
            word = word if one_block else "measured"
            self.add(*place, f"{text}: share", share, (low, high), 1, word)

    def pooled(self, pooled: pd.DataFrame) -> None:
        """The claims of notebook 05.

        pooled  of `pooled_verdicts`
        """
        for row in pooled.itertuples():
            source = f"05, verdicts.csv; {row.whose}; runs: {row.runs}"
            upper = row.theory_high  # of a range its upper end
            theory = upper if np.isfinite(upper) else row.theory_low
            ends = (row.low, row.high) if row.low < row.high else NONE  # one number has none
            missing = re.search(r"without .*", row.whose)  # a part that cannot be measured
            text = f"{row.claim} ({missing[0]})" if missing else row.claim
            numbers = row.value, ends, theory, row.verdict
            self.add("2 convergence", source, text, *numbers, row.control)

    def architectures(self, relative: pd.DataFrame, first: str) -> None:
        """Constants relative to the first architecture.

        relative  of `relative_constants`
        first     the first architecture
        """
        for row in relative.itertuples():
            ends = row.low, row.high
            word = "one seed" if np.isnan(row.low) else verdict(*ends, 1.0)
            word = "no difference seen" if word == "agrees" else word
            text = f"{row.quantity}, {row.architecture} / {first}"
            self.add("2 convergence", "05, convergence.csv", text, row.ratio, ends, 1, word)

    def published(self, beside: pd.DataFrame) -> None:
        """Ours beside published values.

        beside  of `beside_published`
        """
        place = "2 convergence", "07, published.csv; Unraveling the Hessian"
        for row in beside.itertuples():
            text = f"mean absolute deviation of the losses, {row.data}, depth {row.depth:.0f}"
            text += f", width {row.width:.0f}, ours / published"
            ends = row.low / row.published, row.high / row.published
            self.add(*place, text, row.ours / row.published, ends, 1, row.verdict)

    def sizes(self, pilot: pd.DataFrame, check: pd.DataFrame) -> None:
        """The answers on the sample size, and the rules that were checked, each at its worst.

        pilot  rows "pilot" of sample_size.csv of all runs
        check  its rows "check"
        """
        place = "3 sample size", "06, sample_size.csv"
        for (criterion, tau), t in pilot.groupby(["criterion", "tolerance"], sort=False):
            ends, words = (t["lower"].min(), t["upper"].max()), dict.fromkeys(t["verdict"])
            text, word = f"k, {criterion}, tau = {tau:g}", ", ".join(words)
            self.add(*place, text, t["k"].median(), ends, verdict=word)
        for rule, t in check.groupby("criterion", sort=False):
            worst = t.loc[t["failures"].idxmax()]
            ends = worst["failures_low"], worst["failures_high"]
            word = "kept" if (t["verdict"] == "kept").all() else "broken"
            text, allowed = f"failures, {rule}: worst", 1 - worst["confidence"]
            self.add(*place, text, worst["failures"], ends, allowed, word)
