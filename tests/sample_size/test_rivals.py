"""Rules without guarantee: fitted families find their own curves, thumb rules their numbers."""

import math

import numpy as np
import pytest

from utils.sample_size import baselines
from utils.sample_size.rivals import FAMILIES, fitted_sizes


def test_families_find_their_own_curves():
    k = np.geomspace(4, 400, 20)
    for family, (function, parameters) in FAMILIES.items():
        curve = function(k, *parameters)
        target = float(function(np.array([2000.0]), *parameters)[0])
        sizes = fitted_sizes(k, curve, [target, -1e9], family)
        assert sizes[0] == pytest.approx(2000, rel=0.05), family
        assert math.isinf(sizes[1]) or family in ("logarithmic", "algebraic root")


def test_baselines():
    values = np.random.default_rng(8).exponential(size=(1, 600))
    found = baselines(values, 0.05)
    assert set(found) == {"one step", "doubling", *FAMILIES}
    S = values.std(ddof=1)
    assert found["one step"] == math.ceil(S / 0.05)
    law = (S * math.sqrt(2 / math.pi) / 0.05) ** 2  # E|L_k - L| ~ S sqrt(2/(pi k))
    assert found["power law"] == pytest.approx(law, rel=0.5)
    assert baselines(values, 1e-6)["doubling"] == math.inf
    assert np.asarray(baselines(values, 0.05, [0.05, 0.02])["power law"]).shape == (2,)
