"""Between which numbers the arguments of a sample size have to lie."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from utils.bounds import RUNGS
from utils.surface.identities import as_rows

LARGE = 1e100  # whose square is a number of float64
RANGES: dict[str, tuple[float, float]] = {
    "tolerance": (1e-30, 1e30),
    "confidence": (1e-9, 1 - 1e-9),
    "kurtosis": (1.0, 1e9),
    "ceiling": (0.0, LARGE),
    "remainder": (0.0, LARGE),
    "gap": (0.0, LARGE),
    "radius": (0.0, LARGE),
    "ball": (0.0, LARGE),
    "variance": (0.0, math.inf),
    "n": (1, math.inf),
    "k": (1, math.inf),
    "n_probes": (1, math.inf),
    "streams": (1, math.inf),
}


def check_ranges(**values: float | None) -> None:
    """Raise ValueError unless each argument lies between its numbers in `RANGES`; None is left out.

    >>> check_ranges(tolerance=0.1, ceiling=None)
    """
    for name, value in values.items():
        low, high = RANGES[name]
        if value is not None and not low <= value <= high:  # NaN is not
            most = f" to {high:.10g}" if high < math.inf else " on"
            raise ValueError(f"{name} is {value}: give a number from {low:g}{most}.")


def check_rung(rung: str | None) -> None:
    """Raise ValueError unless the rung is one of `bounds.RUNGS`, or None.

    >>> check_rung("prior")
    """
    if rung is not None and rung not in RUNGS:
        raise ValueError(f"rung is {rung!r}: choose one of {', '.join(RUNGS)}.")


def finite_rows(losses: ArrayLike) -> np.ndarray:
    """The losses (n,) or (m, n) as (m, n) of float64. Raises ValueError where one is not finite.

    >>> finite_rows([1, 2]).shape
    (1, 2)
    """
    rows = as_rows(losses)
    bad = ~np.isfinite(rows).all(0)
    if bad.any():
        raise ValueError(f"The loss of example {int(bad.argmax())} is no finite number: remove it.")
    return rows
