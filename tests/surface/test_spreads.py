"""Spreads, eigenspaces and probes against dense Hessians."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from exact import reference, sample_hessians

from utils.surface.neighbourhood import (
    Spreads,
    closed_forms,
    gaussian_probes,
    radii_between,
    range_within,
    spreads,
    top_eigenspace,
)
from utils.surface.plane import plane_losses


def dense_parts(losses):
    """Losses (n,), gradients (n, P) and Hessians (n, P, P), one sample at a time."""
    h = sample_hessians(losses.model, losses.x, losses.y, losses.loss)
    return losses.values(), losses.sample_gradients(), h


def variance(t):
    """Sum over coordinates of the variance over samples, divisor n - 1."""
    return t.reshape(len(t), -1).var(0).sum().item()


@pytest.mark.parametrize("network", [pytest.param("vit", marks=pytest.mark.slow), "linear"])
def test_spreads_against_dense_hessians(network, vit_losses, linear_losses):
    losses = vit_losses(7) if network == "vit" else linear_losses()
    value, g, h = dense_parts(losses)
    traces = h.diagonal(dim1=1, dim2=2).sum(1)
    expected = {
        "value": variance(value),
        "gradient": variance(g),
        "hessian": variance(h),
        "trace": variance(traces),
        "cross": torch.cov(torch.stack([value, traces]))[0, 1].item(),
    }
    whole = spreads(
        losses, basis=torch.eye(losses.P, dtype=torch.float64)
    )  # a basis of everything: exact
    basis = torch.linalg.qr(torch.randn(losses.P, 3, dtype=torch.float64)).Q.T
    inside = basis @ h @ basis.T
    along = spreads(losses, basis=basis)
    assert along.hessian == pytest.approx(variance(inside), rel=1e-9) and along.error == 0
    assert along.gradient == pytest.approx(variance(g @ basis.T), rel=1e-9)
    assert along.trace == pytest.approx(variance(inside.diagonal(dim1=1, dim2=2).sum(1)), rel=1e-9)
    several = [vars(spreads(losses, probes=20, seed=s)) for s in range(12)]
    for name, exact in expected.items():
        assert vars(whole)[name] == pytest.approx(exact, rel=1e-8), name
        found = np.array([s[name] for s in several])
        error = found.std(ddof=1) / math.sqrt(len(found))
        assert abs(found.mean() - exact) <= 5 * error + 1e-9 * abs(exact), (
            name
        )  # unbiased, the square of traces too
    assert (
        0.3
        < np.mean([s["error"] for s in several]) / np.std([s["hessian"] for s in several], ddof=1)
        < 3
    )
    losses.chunk_size = 3
    assert vars(spreads(losses, probes=20, seed=0)) == pytest.approx(several[0], rel=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        spreads(losses, probes=1)


@pytest.mark.parametrize("sigma", [1e-2, 0.3, 3.0])
def test_gaussian_closed_form_is_exact_for_quadratic_losses(linear_losses, sigma):
    """Along two directions, by Gauss-Hermite quadrature, exact for polynomials of this degree."""
    losses = linear_losses()
    basis = torch.linalg.qr(torch.randn(losses.P, 2, dtype=torch.float64)).Q.T
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    weights = weights / weights.sum()
    exact = sum(
        a * b * losses.values(losses.w + sigma * (s * basis[0] + t * basis[1])).var().item()
        for s, a in zip(nodes, weights)
        for t, b in zip(nodes, weights)
    )
    found = spreads(losses, basis=basis)
    assert found.gaussian(sigma) == pytest.approx(exact, rel=1e-10)
    missing = sigma**2 * found.gradient / exact  # the published form lacks this share
    assert found.gaussian(sigma, gradient=False) == pytest.approx(exact * (1 - missing), rel=1e-9)
    assert missing > 1e-4


def test_gaussian_probes():
    w = torch.arange(5.0, dtype=torch.float64)
    z = (gaussian_probes(w, 0.1, 4000, seed=1) - w) / 0.1
    assert z.shape == (4000, 5) and torch.equal(
        z, (gaussian_probes(w, 0.1, 4000, seed=1) - w) / 0.1
    )
    assert (
        z.mean(0).abs().max() < 5 / math.sqrt(4000)
        and (torch.cov(z.T) - torch.eye(5)).abs().max() < 0.1
    )
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q.T
    d = gaussian_probes(w, 0.1, 50, seed=1, basis=basis) - w
    torch.testing.assert_close(d @ basis.T @ basis, d)  # inside the span
    assert 0.05 < (d @ basis.T).std().item() < 0.2


def test_top_eigenspace_against_a_dense_hessian(vit_losses):
    losses = vit_losses(9)
    H = reference(losses.model, losses.x[:5], losses.y[:5])[2]
    theta = torch.linalg.eigvalsh(H)
    theta = theta[theta.abs().argsort(descending=True)][:4].numpy()
    found = top_eigenspace(losses, 4, torch.arange(5))
    np.testing.assert_allclose(found.values, theta, rtol=1e-5)
    assert (found.residuals <= 1e-5 * np.abs(found.values[0])).all()
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(4, dtype=torch.float64))
    products = found.vectors @ H - torch.as_tensor(found.values)[:, None] * found.vectors
    np.testing.assert_allclose(
        products.norm(dim=1), found.residuals, atol=1e-9 * np.abs(found.values[0])
    )


def test_plane_losses_have_rows_and_columns(vit_losses):
    losses = vit_losses(4)
    axes = torch.linalg.qr(torch.randn(losses.P, 2, dtype=torch.float64)).Q.T
    at, values = plane_losses(losses, axes, 0.2, 5)
    assert at.tolist() == pytest.approx([-0.2, -0.1, 0.0, 0.1, 0.2]) and values.shape == (5, 5, 4)
    np.testing.assert_allclose(values[2, 2], losses.values().numpy(), rtol=1e-12)
    expected = losses.values(losses.w + 0.1 * axes[0] - 0.2 * axes[1])
    np.testing.assert_allclose(values[0, 3], expected.numpy(), rtol=1e-12)
    assert not np.allclose(values[3, 0], values[0, 3])


def test_the_table_of_constants():
    spread = Spreads(value=4.0, gradient=9.0, hessian=16.0, trace=0.0, cross=0.0, error=10.0)
    table = spread.table(7.0).set_index("quantity")
    assert list(table["value"]) == [2.0, 3.0, 4.0, 7.0]
    assert tuple(table.loc["Hessian spread", ["low", "high"]]) == (0.0, 6.0)  # none below zero
    assert table["low"].isna().sum() == 3


def test_closed_forms_are_refined_where_they_fail(linear_losses):
    """Exact for quadratic losses; with a wrong gradient it fails, and more radii are asked."""
    losses = linear_losses()
    spread, length = spreads(losses, basis=torch.eye(losses.P, dtype=torch.float64)), 2.0
    asked = []

    def draw(f):
        asked.append(f)
        w = gaussian_probes(losses.w, f * length / losses.P**0.5, 300, seed=1)
        return np.stack([losses.values(v).numpy() for v in w])

    values = {f: draw(f) for f in (1e-5, 1e-1)}
    table = closed_forms(spread, length, losses.P, values, draw)
    assert list(table["radius"]) == [1e-5, 1e-1] and len(asked) == 2
    assert ((table["with"] - 1).abs() <= 0.02 + 2 * table["error"]).all()
    assert (table["without"] < table["with"]).all()
    wrong = replace(spread, gradient=spread.gradient * 100)
    finer = closed_forms(wrong, length, losses.P, values, draw)
    assert len(finer) == 5 and finer["radius"].is_monotonic_increasing
    assert abs(finer["with"].iloc[0] - 1) <= 0.1 < abs(finer["with"].iloc[-1] - 1)
    assert radii_between([1.0, 2.0], [2.0, 2.0]).size == radii_between([1.0], [1.0]).size == 0


def test_the_range_of_a_closed_form():
    table = pd.DataFrame({"with": [1.0, 1.05, 1.3, 2.0], "error": [0.01, 0.01, 0.5, 0.01]})
    assert range_within(table, "with") == (2, 4)  # the third cannot tell
    assert range_within(table[:2], "with") == (2, 3) and range_within(table[3:], "with") == (0, 1)
