"""Verdicts: a measured interval beside what theory says, and a control that should fail.

"agrees", "differs" and "cannot tell" are of intervals, "holds", "violated" and "vacuous" of
inequalities; what agrees or holds while its control has not failed "proves nothing".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from utils.surface.claims import Claim
from utils.surface.intervals import binomial_interval

NONE = (math.nan, math.nan)  # an interval, or theory, that is not there


def verdict(low: float, high: float, theory_low: float, theory_high: float | None = None) -> str:
    """Whether the measured interval meets the value, or the interval, of theory.

    low          lower end of the measured interval
    high         upper end
    theory_low   value of theory, or its lower end
    theory_high  upper end; `theory_low`, if there is none

    Returns "agrees" or "differs"; "cannot tell" where one of the ends is nan.

    >>> verdict(-1.1, -0.9, -1.0), verdict(0.0, 1.0, 2.0, 3.0), verdict(math.nan, 1.0, 1.0)
    ('agrees', 'differs', 'cannot tell')
    """
    theory_high = theory_low if theory_high is None else theory_high
    if np.isnan([low, high, theory_low, theory_high]).any():
        return "cannot tell"
    return "agrees" if low <= theory_high and theory_low <= high else "differs"


def inequality(broken: bool, known: bool = True, slack: float = 1.0) -> str:
    """Whether a proved inequality holds.

    broken  something measured exceeds the bound
    known   the bound is there, everywhere
    slack   bound over what was measured, least [1]

    Returns "violated", "no bound", "holds", or "vacuous" where nothing came within a factor of
    1000.

    >>> inequality(False, slack=2.0), inequality(False, slack=1e6)
    ('holds', 'vacuous')
    """
    if broken:
        return "violated"
    if not known:
        return "no bound"
    return "vacuous" if slack > 1e3 else "holds"


def with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A number with its interval as text, to some digits; what is nan is left out.

    value   the number
    low     lower end of its interval
    high    upper end
    digits  significant ones [1]

    >>> with_interval(1.2345, 1.0, 2.0), with_interval(1.2345, math.nan, math.nan)
    ('1.23 [1, 2]', '1.23')
    """
    short, *ends = ("" if np.isnan(v) else f"{v:.{digits}g}" for v in (value, low, high))
    return f"{short} [{', '.join(ends)}]" if ends[0] else short


class Slope(NamedTuple):
    """A measured slope with its interval, and the exact one on the same k.

    >>> print(Slope(-1.0, -1.1, -0.9, -0.98))
    -1.000 [-1.100, -0.900], exact -0.980
    """

    value: float
    low: float
    high: float
    exact: float

    @classmethod
    def of(cls, table: pd.DataFrame) -> Slope:
        """The row `slope` of a table of `utils.surface.measured`."""
        row = table[table["quantity"] == "slope"].iloc[0]
        return cls(*row[["value", "low", "high", "theory_low"]])

    def __str__(self) -> str:
        ends = "(no interval)" if np.isnan(self.low) else f"[{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f} {ends}, exact {self.exact:.3f}"

    def times(self, factor: float) -> Slope:
        """The slope of what was measured to the power `factor`."""
        return Slope(*(factor * number for number in self))

    def misses(self, value: float) -> bool:
        """Whether the interval leaves out a value; a control has failed where it does."""
        return verdict(self.low, self.high, value) == "differs"


Theory = float | tuple[float, float]  # a value, or its two ends


class Record:
    """What one run measured and claims: the rows of convergence.csv and of verdicts.csv.

    >>> record = Record(100)
    >>> record.claim(Claim("a slope", "prop:rate"), -1.0, (-1.1, -0.9), -1.0, fails=True)
    a slope: -1 [-1.1, -0.9], agrees.
    """

    NUMBERS = ("value", "low", "high", "theory_low", "theory_high")

    def __init__(self, n_orders: int):
        self.n_orders = n_orders  # unless a measurement says otherwise
        self.tables: list[pd.DataFrame] = []
        self.claims: list[dict] = []

    def add(
        self,
        table: pd.DataFrame,
        experiment: str,
        weights: str,
        radius: float = 0.0,
        n: int | None = None,
    ) -> None:
        """Rows of convergence.csv; numbers that the table lacks are nan, its own `radius` stays.

        table       with columns k, quantity, value and perhaps more of `NUMBERS`
        experiment  its name in the data dictionary
        weights     whose losses
        radius      of the ball or Gaussian [fraction of |w0|]
        n           over how many orders, if not those of the record
        """
        columns = ["k", "quantity", *self.NUMBERS, *({"radius"} & set(table.columns))]
        n = self.n_orders if n is None else n
        table = table.reindex(columns=columns).assign(experiment=experiment, weights=weights, n=n)
        self.tables.append(table if "radius" in table else table.assign(radius=radius))

    def claim(
        self,
        claim: Claim,
        value: float,
        interval: tuple[float, float] = NONE,
        theory: Theory = math.nan,
        word: str | None = None,
        fails: bool = False,
        trials: int = 0,
        **words: Any,
    ) -> None:
        """A row of verdicts.csv, which is printed as well.

        claim     of `utils.surface.claims`
        value     measured
        interval  of the value
        theory    value, or its two ends
        word      the verdict, if it is not that of `verdict`
        fails     the control came out otherwise
        trials    behind a share [1]
        words     for the braces in the claim
        """
        ends = theory if isinstance(theory, tuple) else (theory, theory)
        word = word or verdict(*interval, *ends)
        if word in ("agrees", "holds") and not fails:
            word = "proves nothing"
        row: dict[str, Any] = {"claim": claim.text.format(**words), "whose": claim.whose}
        row |= dict(zip(self.NUMBERS, map(float, (value, *interval, *ends)), strict=True))
        row |= {"verdict": word, "control": claim.control.format(**words)}
        row |= {"control_failed": bool(fails), "pooled": claim.pooled, "trials": trials}
        self.claims.append(row)
        said = f"{row['claim']}: {with_interval(value, *interval)}, {word}"
        print(f"{said} (control: {row['control']})." if claim.control else f"{said}.")

    def claim_slope(
        self, claim: Claim, slope: Slope, control: Slope, word: str | None = None, **words: Any
    ) -> None:
        """A claim on a slope, whose control is a slope through the same fit.

        claim    of `utils.surface.claims`, its control with {control}
        slope    measured
        control  has failed where its interval leaves out the exact value of the claim
        word     the verdict, if it is not that of `verdict`
        words    for the other braces in the claim
        """
        fails = control.misses(slope.exact)
        numbers = slope.value, (slope.low, slope.high), slope.exact
        self.claim(claim, *numbers, word, fails, control=control, **words)

    def claim_share(
        self,
        claim: Claim,
        hits: int,
        trials: int,
        theory: Theory,
        word: str,
        fails: bool,
        /,
        **words: Any,
    ) -> None:
        """A claim on a share of trials, with its exact binomial interval.

        claim   of `utils.surface.claims`
        hits    how many of the trials [1]
        trials  how many in all [1]
        theory  value, or its two ends
        word    the verdict
        fails   the control came out otherwise
        words   for the braces in the claim
        """
        interval = binomial_interval(hits, trials)
        self.claim(claim, hits / trials, interval, theory, word, fails, trials, **words)

    def measurements(self) -> pd.DataFrame:
        """convergence.csv."""
        return pd.concat(self.tables, ignore_index=True)

    def verdicts(self) -> pd.DataFrame:
        """verdicts.csv."""
        return pd.DataFrame(self.claims)


def in_words(verdicts: pd.DataFrame) -> pd.DataFrame:
    """verdicts.csv for reading: numbers with their intervals as text.

    verdicts  as `Record.verdicts` returns it

    >>> record = Record(100)
    >>> record.claim(Claim("a slope", "prop:rate"), -1.0, (-1.1, -0.9), -1.0, fails=True)
    a slope: -1 [-1.1, -0.9], agrees.
    >>> in_words(record.verdicts())["measured"].item()
    '-1 [-1.1, -0.9]'
    """
    measured = [with_interval(*row) for row in verdicts[["value", "low", "high"]].to_numpy()]
    theory = []
    for low, high in verdicts[["theory_low", "theory_high"]].to_numpy():
        ends = dict.fromkeys(f"{end:.3g}" for end in (low, high) if not np.isnan(end))
        theory.append(" to ".join(ends))
    table = verdicts.assign(measured=measured, theory=theory)
    return table[["claim", "whose", "measured", "theory", "verdict", "control"]]
