"""In which order examples arrive, and the sizes k at which a sample is looked at.

Streams: `random_orders` is `[seed, 5]`; `typical_first_orders` is `[seed, 23]`, which the forecast
of training (`sample_size`) draws its permutations from as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from utils.run.streams import numpy_generator


def random_orders(n: int, n_orders: int, seed: int = 0) -> np.ndarray:
    """Independent uniform permutations of 0 .. n - 1.

    n         size of the pool [examples]
    n_orders  how many orders [1]
    seed      of the stream `[seed, 5]`

    Returns (n_orders, n) integers.

    >>> random_orders(4, 2).shape
    (2, 4)
    """
    generator = numpy_generator("orders", seed)
    return np.stack([generator.permutation(n) for _ in range(n_orders)])


def typical_first_orders(losses: ArrayLike, n_orders: int, seed: int = 0) -> np.ndarray:
    """Random orders in which losses near the mean tend to come first.

    The next example is drawn in inverse proportion to the rank of |l - mean| among all. This is the
    control of statements on uniform orders: as random as those, but later examples differ more,
    whatever the shape of the list.

    losses    (n,) [nat]
    n_orders  how many orders [1]
    seed      of the stream `[seed, 23]`

    Returns (n_orders, n) integers.

    >>> typical_first_orders([1.0, 5.0, 9.0], 4).shape
    (4, 3)
    """
    losses = np.asarray(losses, dtype=np.float64)
    distance = np.abs(losses - losses.mean())
    rank = np.argsort(np.argsort(distance)) + 1
    times = numpy_generator("typical first", seed).exponential(size=(n_orders, len(losses)))
    return np.argsort(times * rank, axis=1)


def log_grid(low: int, high: int, points: int) -> np.ndarray:
    """Distinct integers, equally spaced in log k.

    low     the first (`high`, if that is smaller) [examples]
    high    the last [examples]
    points  about how many [1]

    Raises ValueError where there is no size to look at, `high` is below 1.

    >>> log_grid(1, 100, 3).tolist()
    [1, 10, 100]
    """
    if high < 1:
        raise ValueError(
            f"The sizes k end at {high}: give more samples, or a batch smaller than their number."
        )
    spaced = np.geomspace(min(low, high), high, points)
    return np.unique(np.round(spaced).astype(int))
