"""Trace, spectral density and block norms against dense matrices."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import F64, reference
from networks import NETWORKS, Fused, Hidden, case, examples, random_vit
from refusal import refused
from torch import nn

from utils.hessian import hessian_block_norms, hessian_trace, spectral_density
from utils.hessian.blocks import parameter_groups


def test_trace():
    """Within four standard errors, unbiased over seeds, and the standard error is the spread over
    seeds.
    """
    model, x, y, loss = case("mlp")
    exact = reference(model, x, y, loss)[2].trace().item()
    value, error = hessian_trace(model, x, y, loss, probes=64)
    assert 0 < error and abs(value - exact) <= 4 * error
    runs = torch.tensor(
        [hessian_trace(model, x, y, loss, probes=8, seed=s) for s in range(40)], dtype=F64
    )
    spread = runs[:, 0].std().item()
    assert abs(runs[:, 0].mean().item() - exact) <= 4 * spread / math.sqrt(40)
    assert 0.7 <= runs[:, 1].square().mean().sqrt().item() / spread <= 1.4
    # of a diagonal Hessian every Rademacher probe gives the trace itself
    hidden = Hidden().double()
    value, error = hessian_trace(hidden, x, y, probes=3, parameters=["unseen"])
    diagonal_hessian = reference(hidden, x, y, "cross_entropy", names=["unseen"])[2]
    assert value == pytest.approx(diagonal_hessian.trace().item(), rel=1e-10)
    assert error <= 1e-10 * abs(value)


@pytest.mark.slow
def test_hutch_plus_plus_beats_hutchinson_where_few_eigenvalues_rule():
    """Unbiased over seeds, its standard error is its spread, and it is smaller at the same number
    of products.
    """
    model, (x, y), loss = random_vit(3, 1.6, depth=2), examples(), "cross_entropy"
    exact = reference(model, x, y, loss)[2].trace().item()
    spread = {}
    for estimator in ("hutchinson", "hutch++"):
        found = torch.tensor(
            [
                hessian_trace(model, x, y, loss, estimator=estimator, probes=24, seed=s)
                for s in range(40)
            ],
            dtype=F64,
        )
        spread[estimator] = found[:, 0].std().item()
        assert abs(found[:, 0].mean().item() - exact) <= 4 * spread[estimator] / math.sqrt(40)
        assert 0.6 <= found[:, 1].square().mean().sqrt().item() / spread[estimator] <= 1.6
    assert spread["hutch++"] < 0.5 * spread["hutchinson"]
    for estimator, probes in (("hutchinson", 1), ("hutch++", 5), ("pyhessian", 1)):
        refused(
            lambda e=estimator, n=probes: hessian_trace(model, x, y, loss, estimator=e, probes=n),
            "probes",
        )
    refused(lambda: hessian_trace(model, x, y, loss, estimator="xtrace"), "hutchinson")


@pytest.mark.slow
def test_spectral_density_counts_the_eigenvalues():
    """All P steps from each start: the weights are those of the dense spectrum; fewer keep the
    moments.
    """
    model, x, y, loss = case("mlp")
    H = reference(model, x, y, loss)[2]
    values, P = torch.linalg.eigvalsh(H).numpy(), len(H)
    full = spectral_density(model, x, y, loss, probes=60, steps=P)
    assert full.nodes.shape == full.weights.shape == (60, P) and full.P == P
    np.testing.assert_allclose(full.weights.sum(1), 1, rtol=1e-12)
    thresholds = [0.3 * values.max(), 0.05 * values.max(), 1e-3 * values.max()]
    for sign in (1, -1):
        mean, low, high = full.count(thresholds, sign)
        exact = [(sign * values > t).sum() for t in thresholds]
        slack = (high - low) * 0.75 + 1e-9  # 60 probes: three standard errors
        assert (np.abs(mean - exact) <= slack).all(), (sign, mean, exact, slack)
    few = spectral_density(model, x, y, loss, probes=60, steps=4)
    for power in (1, 2, 3):
        value, error = few.moment(power)
        assert abs(value - (values**power).sum()) <= 4 * error
        again = full.moment(
            power
        )  # the same starts: moments below 2 steps do not depend on the steps
        assert value == pytest.approx(again[0], rel=1e-8)
    flat = spectral_density(
        nn.Linear(16, 3).double(), 0 * x.flatten(1), y, probes=2, steps=9, parameters=["weight"]
    )
    assert not flat.nodes.any() and flat.count([0.5])[0] == 0
    refused(lambda: spectral_density(model, x, y, loss, probes=1), "probes")


def test_block_norms_are_those_of_the_dense_blocks():
    assert len(parameter_groups(NETWORKS["two blocks"]())) == 16  # two blocks
    model, x, y, loss = case("post mean gelu mse")
    H = reference(model, x, y, loss)[2]
    groups = parameter_groups(model)
    assert list(groups)[:2] == ["embedding", "LN 1"]
    assert list(groups)[-1] == "head" and len(groups) == 9
    assert sorted(n for names in groups.values() for n in names) == sorted(
        n for n, _ in model.named_parameters()
    )
    found = hessian_block_norms(model, x, y, loss, tolerance=1e-4, max_steps=60)
    assert found.groups == list(groups) and found.values.shape == found.residual.shape == (9, 9)
    owner = torch.cat([torch.full((p.numel(),), i) for _, p in model.named_parameters()
                       for i, names in enumerate(groups.values()) if _ in names])  # fmt: skip
    for i, j in itertools.product(range(9), repeat=2):
        exact = torch.linalg.matrix_norm(H[owner == i][:, owner == j], 2).item()
        assert found.values[i, j] == pytest.approx(exact, rel=1e-6), (i, j)
        assert found.residual[i, j] <= 1e-3 * exact
    # groups that share parameters
    names = [n for n, _ in model.named_parameters()]
    mixed = {"all": ["*"], "some": names[2:5], "others": [names[4], "head.*"]}
    found = hessian_block_norms(model, x, y, loss, groups=mixed, tolerance=1e-4, max_steps=60)
    place = dict(zip(names, torch.arange(len(H)).split([p.numel() for p in model.parameters()])))
    meant = {"all": names, "some": names[2:5], "others": [names[4], "head.weight", "head.bias"]}
    rows = [torch.cat([place[n] for n in group]) for group in meant.values()]
    for i, j in itertools.product(range(3), repeat=2):
        exact = torch.linalg.matrix_norm(H[rows[i]][:, rows[j]], 2).item()
        assert found.values[i, j] == pytest.approx(exact, rel=1e-6), (i, j)
    # any other module: one group for each submodule that owns parameters
    assert list(parameter_groups(Fused())) == ["scale", "shift", "embed", "qkv", "head"]
