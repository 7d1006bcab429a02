"""The answer to a question about sample size: numbers, a verdict in one word, and a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import spearmanr

DRIFT = (
    1e-3  # p-value of the rank correlation of loss and place below which the order is no accident
)


@dataclass(frozen=True)
class SampleSize:
    """The answer to one question (criterion, tolerance, radius, confidence).

    criterion   one of `CRITERIA`
    tolerance   acceptable change of the mean loss [nat]
    radius      of the neighbourhood or the ball, Euclidean distance in the weights
    confidence  1 - delta
    k           a central value without guarantee: surface, the Gaussian limit at the pilot's own
                spread; ball and excess, the theorem's size at the pilot's own spreads; next and
                step, the pilot's own size
    lower       fewer are too few: surface, Gaussian limit at the lower limit of the spread
                (asymptotic); step, the exact worst order of the pilot; 1 where nothing is claimed
    upper       that many are enough at the stated confidence under the stated assumption; inf if
                the pilot cannot tell
    verdict     "enough", "need" or "cannot tell"
    sentence    the verdict in words
    statement   what population the numbers speak of, and what they leave out
    terms       the measured quantities by name
    """

    criterion: str
    tolerance: float
    radius: float
    confidence: float
    k: float
    lower: float
    upper: float
    verdict: str
    sentence: str
    statement: str
    terms: dict[str, float] = field(default_factory=dict)


def conclude(k: float, lower: float, upper: float, n: int, least: float, terms: dict) -> dict:
    """The fields of an answer from its interval.

    k             the central value
    lower, upper  the interval
    n             examples in the pilot
    least         examples from which on a pilot can tell, inf if none can
    terms         measured quantities by name

    >>> conclude(160, 57, 1886, n=359, least=120, terms={})["sentence"]
    'need k in [57, 1886]'
    """
    if math.isinf(upper):
        verdict = "cannot tell"
        sentence = "cannot tell from this pilot"
        if n < least < math.inf:
            sentence += f": at least {least - n:.0f} more first"
    elif upper <= n:
        verdict = "enough"
        sentence = f"enough: {upper} suffice and the pilot has {n}"
    else:
        verdict = "need"
        sentence = f"need k in [{lower}, {upper}]"
    numbers = {"k": k, "lower": lower, "upper": upper, "terms": terms | {"pilot": n}}
    return numbers | {"verdict": verdict, "sentence": sentence}


def drift(values: np.ndarray) -> dict:
    """The fields to replace if the values (n,), losses, follow the order they came in, else none.

    Such a pilot is no random sample. The test is Spearman's rank correlation of loss and place.

    >>> drift(np.arange(100.0))["verdict"]
    'cannot tell'
    >>> drift(np.ones(100))
    {}
    """
    if np.ptp(values) == 0:
        return {}
    correlation = spearmanr(np.arange(len(values)), values)
    if not correlation.pvalue < DRIFT:
        return {}
    sentence = (
        "cannot tell: the losses follow the pilot's order "
        f"(rank correlation {correlation.statistic:.2f}); if the order means nothing, shuffle the "
        "pilot, and if it is time, the mean need not settle at all"
    )
    return {"upper": math.inf, "verdict": "cannot tell", "sentence": sentence}
