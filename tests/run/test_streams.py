"""Random streams: the numbers behind the committed results, and which of them are shared."""

from collections import Counter

import numpy as np
import pytest
from refusal import refused

from utils.run.streams import (
    NUMPY,
    STREAMS,
    TORCH,
    generator,
    numpy_generator,
    split_generator,
    torch_seed,
)


@pytest.mark.parametrize(
    ("name", "seed", "number"),
    [
        ("batches", 7, 7),
        ("lanczos start", 7, 0x5EED_0F_1A7C05 + 7),
        ("pyhessian", 7, 0x9E5510 + 7),
        ("gaussian probes", 7, 0x6A55 + 7),
        ("signs of spreads", 7, 0x5163 + 7),
        ("ball probes", 7, 0xBA11 + 7),
        ("signs of a pilot", 7, 0xFA12 + 7),
    ],
)
def test_streams_of_torch_add_their_number_to_the_seed(name, seed, number):
    assert generator(name, seed).initial_seed() == torch_seed(name, seed) == number


@pytest.mark.parametrize(
    ("name", "seed", "entropy"),
    [
        ("orders", 3, [3, 5]),
        ("bootstrap of means", 3, [3, 7]),
        ("bootstrap of slopes", 3, [3, 11]),
        ("pairs of a pilot", 3, [3, 13]),
        ("eigenspace start", 3, [3, 17]),
        ("gaussian factor", 3, [3, 17]),
        ("settling curve", 3, [3, 19]),
        ("typical first", 3, [3, 23]),
        ("doubling", 3, [3, 23]),
        ("true size", 3, [3, 29]),
        ("synthetic data set", 3, [0, 3]),
        ("synthetic draw", 3, [1, 3]),
        ("class means", 20240917, 20240917),
        ("gram start", 0, 0),
    ],
)
def test_streams_of_numpy(name, seed, entropy):
    drawn = numpy_generator(name, seed).integers(2**60, size=4)
    np.testing.assert_array_equal(drawn, np.random.default_rng(entropy).integers(2**60, size=4))


def test_the_split_is_numpys_old_generator():
    drawn = split_generator("split", 3).permutation(9)
    np.testing.assert_array_equal(drawn, np.random.RandomState(3).permutation(9))


@pytest.mark.parametrize(("kind", "shared"), [(TORCH, {0: 3}), (NUMPY, {0: 2, 17: 2, 23: 2})])
def test_no_two_streams_share_a_number_but_those_that_say_so(kind, shared):
    numbers = Counter(number for k, number in STREAMS.values() if k == kind)
    assert {number: count for number, count in numbers.items() if count > 1} == shared


def test_a_stream_that_nobody_named_is_refused():
    refused(lambda: generator("nobody", 0), "nobody", "utils/run/streams.py")
    refused(lambda: generator("orders", 0), "orders", "numpy")
    refused(lambda: numpy_generator("batches", 0), "batches", "torch")
    refused(lambda: split_generator("orders", 0), "orders")
