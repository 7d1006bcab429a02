"""The split is a stratified partition in random order."""

import numpy as np
import pytest

from utils.data.split import split_rows


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("fractions", [(0.2, 0.2), (0.1, 0.35)])
def test_split_is_a_stratified_partition(seed, fractions):
    y = np.repeat([0, 1, 2], [200, 90, 31])
    parts = split_rows(y, *fractions, np.random.RandomState(seed))
    together = np.concatenate(parts)
    assert len(set(together)) == len(together) == len(y)
    for part, share in zip(parts, (1 - sum(fractions), *fractions), strict=True):
        assert abs(len(part) - share * len(y)) <= 1.5
        np.testing.assert_allclose(np.bincount(y[part]), share * np.bincount(y), atol=1.5)
        assert not np.array_equal(part, np.sort(part))  # the order inside a part is random


def test_split_without_a_test_part_uses_every_row():
    y = np.arange(50) % 5
    train, calibration, test = split_rows(y, 0.2, None, np.random.RandomState(0))
    assert (len(train), len(calibration), len(test)) == (40, 10, 0)
    assert set(train) | set(calibration) == set(range(50))


@pytest.mark.parametrize("rare", [3, 4, 5, 9])
@pytest.mark.parametrize("fractions", [(0.2, 0.2), (0.4, 0.4), (0.1, 0.5), (0.5, 0.3), (0.05, 0.9)])
def test_a_rare_class_is_in_every_part_or_refused(rare, fractions):
    y = np.r_[np.zeros(1000, int), np.ones(rare, int)]
    try:
        parts = split_rows(y, *fractions, np.random.RandomState(0))
    except ValueError as error:
        message = str(error)
        assert message.endswith(".") and ". " not in message and "class 1" in message
    else:
        assert sorted(np.concatenate(parts)) == list(range(len(y)))
