"""Norms of examples, means and differences against dense matrices in float64."""

import math

import numpy as np
import pytest
import torch
from exact import F64, norms_of, reference, sample_hessians
from networks import Fused, Hidden, case, examples, random_vit, randomised, tiny_vit
from refusal import refused
from torch import nn
from torch.nn import functional as F

from utils.hessian import (
    Losses,
    hessian_block_norms,
    hessian_difference_norms,
    hessian_norm,
    hessian_trace,
    per_sample_gradients,
    per_sample_hessian_norms,
    spectral_density,
)
from utils.hessian import lanczos as module
from utils.hessian.lanczos import lanczos


class TwoLinear(nn.Module):
    """W_2 W_1 x with small weights: the Hessian is nearly [[0, C], [C^T, 0]], whose spectrum is
    symmetric about 0.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(x.flatten(1)))


class Late(nn.Module):
    """Ends of the spectrum near -1 and 0.98, and a gradient with a share of 1e-4 in the larger one:
    it comes late.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(40))
        self.register_buffer(
            "bend", torch.cat([torch.linspace(-0.3, 0.3, 38), torch.tensor([0.98, -1.0])])
        )
        self.register_buffer("slope", torch.tensor([1e-3] * 39 + [1e-7]))

    def forward(self, x):
        f = (
            2
            + 0.1 * x.flatten(1).mean(1, keepdim=True)
            + self.slope @ self.w
            + self.bend @ self.w**2 / 2
        )
        return torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], 1)


def never(ritz, steps):
    return torch.zeros_like(ritz.value, dtype=torch.bool)


def scaled(make, scale):
    return lambda: randomised(make(), 7, scale)


NORM_CASES = {
    "vit": lambda: random_vit(5),
    "vit-small-weights": lambda: random_vit(6, 0.2, norm="post"),
    "vit-large-weights": lambda: random_vit(8, 1.5, pool="mean"),
    "fused": lambda: randomised(Fused(), 5),
    "near-degenerate-1e-1": scaled(TwoLinear, 1e-1),
    "near-degenerate-1e-2": scaled(TwoLinear, 1e-2),
    "near-degenerate-1e-4": scaled(TwoLinear, 1e-4),
    "hidden": lambda: Hidden().double(),
    "late": lambda: Late().double(),
}


QUICK = [(name, "cross_entropy") for name in NORM_CASES]
QUICK += [(name, "mse") for name in ("vit", "hidden", "near-degenerate-1e-4")]
LONGER = [(name, "mse") for name in NORM_CASES if (name, "mse") not in QUICK]


@pytest.mark.parametrize(
    "name, loss", [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in LONGER)]
)
def test_per_sample_norms_are_those_of_dense_hessians(name, loss):
    model, (x, y) = NORM_CASES[name](), examples(8, 11)
    hessians = sample_hessians(model, x, y, loss)
    exact = norms_of(hessians)
    found = per_sample_hessian_norms(model, x, y, loss, chunk_size=5)
    for column in (
        found.value,
        found.lower,
        found.upper,
        found.residual,
        found.iterations,
        found.converged,
    ):
        assert isinstance(column, torch.Tensor) and column.shape == (8,)
    assert (
        found.value.dtype == F64
        and found.converged.dtype == torch.bool
        and not found.iterations.is_floating_point()
    )
    assert ((found.value - exact).abs() <= 1e-3 * exact).all()
    assert (found.value <= exact * (1 + 1e-10)).all() and torch.equal(found.lower, found.value)
    assert found.upper.isnan().all()  # a gradient start certifies nothing above
    assert torch.equal(found.converged, found.residual <= 1e-4 * found.value)
    # an eigenvalue lies within the residual of +value or -value
    spectra = torch.linalg.eigvalsh((hessians + hessians.mT) / 2).abs()
    assert ((spectra - found.value[:, None]).abs().amin(1) <= found.residual + 1e-10 * exact).all()

    certified = per_sample_hessian_norms(model, x, y, loss, certify=True, chunk_size=5)
    assert (certified.value <= exact * (1 + 1e-10)).all()
    assert (exact <= certified.upper * (1 + 1e-10)).all()
    assert ((certified.upper <= 1.05 * certified.value * (1 + 1e-12)) == certified.converged).all()
    assert certified.converged.any()


def test_spectra_of_the_norm_cases():
    """The cases above are what they are named for: indefinite, +/- degenerate, unseen by the
    gradient.
    """
    x, y = examples(8, 11)
    spectra = torch.linalg.eigvalsh(sample_hessians(NORM_CASES["near-degenerate-1e-4"](), x, y))
    ends = spectra[:, [0, -1]]
    assert ((ends[:, 0] + ends[:, 1]).abs() <= 1e-3 * ends[:, 1]).all()
    spectra = torch.linalg.eigvalsh(sample_hessians(NORM_CASES["vit-small-weights"](), x, y))
    ends = spectra[:, [0, -1]]
    assert (ends[:, 0] < -0.2 * ends[:, 1]).any()
    model = NORM_CASES["hidden"]()
    g, H = per_sample_gradients(model, x, y), sample_hessians(model, x, y)
    values, vectors = torch.linalg.eigh(H)
    top = vectors[torch.arange(8), :, values.abs().argmax(1)]
    assert (g * top).sum(1).abs().max() <= 1e-12 * g.norm(dim=1).min()


def test_samples_without_curvature():
    """All-zero gradients and Hessians give 0, not nan, and end at once."""
    model = TwoLinear().double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x, y = examples(3)
    for certify in (False, True):
        found = per_sample_hessian_norms(model, 0 * x, y, certify=certify)
        assert found.value.tolist() == [0.0] * 3 and found.residual.tolist() == [0.0] * 3
        assert found.converged.all()


def test_the_failure_is_divided_over_the_samples(monkeypatch):
    asked, original = set(), module.lanczos_epsilon
    monkeypatch.setattr(
        module,
        "lanczos_epsilon",
        lambda steps, P, failure: asked.add(failure) or original(steps, P, failure),
    )
    model, (x, y) = randomised(Fused(), 5), examples(4)
    per_sample_hessian_norms(model, x, y, certify=True, confidence=0.9, chunk_size=3, max_steps=5)
    assert [*asked] == [pytest.approx(0.1 / 4)]
    asked.clear()
    hessian_norm(model, x, y, certify=True, confidence=0.9, max_steps=5)
    assert [*asked] == [pytest.approx(0.1)]


def test_few_steps_certify_nothing():
    model, (x, y) = random_vit(5), examples(3)
    found = per_sample_hessian_norms(model, x, y, certify=True, max_steps=3)
    assert found.upper.isinf().all() and not found.converged.any()
    assert (found.value <= norms_of(sample_hessians(model, x, y)) * (1 + 1e-10)).all()
    assert hessian_norm(model, x, y, certify=True, max_steps=3).upper == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pre cls gelu", "post mean gelu mse", "fused", "encoder pre"])
def test_estimators_of_the_norm_agree(name):
    model, x, y, loss = case(name)
    H = reference(model, x, y, loss)[2]
    norm = float(norms_of(H))
    exact = hessian_norm(model, x, y, loss, estimator="exact")
    assert exact.value == pytest.approx(norm, rel=1e-10)
    assert exact.residual <= 1e-9 * norm and exact.lower <= exact.value <= exact.upper
    for tolerance in (1e-2, 1e-6):
        found = hessian_norm(model, x, y, loss, tolerance=tolerance)
        assert (
            found.value <= norm * (1 + 1e-12)
            and found.converged
            and found.residual <= tolerance * found.value
        )
        assert math.isnan(found.upper)
    assert found.value == pytest.approx(norm, rel=1e-8)
    certified = hessian_norm(model, x, y, loss, certify=True)
    assert certified.lower <= norm * (1 + 1e-12) and norm <= certified.upper <= 1.05 * norm * (
        1 + 1e-12
    )
    power = hessian_norm(model, x, y, loss, estimator="pyhessian")
    assert power.value == pytest.approx(norm, rel=0.02) and power.lower <= norm * (1 + 1e-12)
    for estimate in (exact, found, certified, power):
        for field in (estimate.value, estimate.lower, estimate.upper, estimate.residual):
            assert isinstance(field, float)
        assert isinstance(estimate.iterations, int) and isinstance(estimate.converged, bool)
    refused(lambda: hessian_norm(model, x, y, loss, estimator="power"), "power", "lanczos")


def test_pyhessian_is_taken_through_its_adapter():
    """Value, residual and convergence are ours, by the dense matrix; a subset of the parameters
    works, too.
    """
    model, x, y, loss = case("pre cls gelu")
    for names in (None, ["head.weight", "head.bias"]):
        H = reference(model, x, y, loss, names)[2]
        norm = float(norms_of(H))
        found = hessian_norm(model, x, y, loss, estimator="pyhessian", parameters=names)
        assert found.value == pytest.approx(norm, rel=1e-4) and found.lower <= norm * (1 + 1e-12)
        nearest = (torch.linalg.eigvalsh((H + H.T) / 2).abs() - found.value).abs().min()
        assert nearest <= found.residual + 1e-10 * norm and found.converged == (
            found.residual <= 1e-4 * found.value
        )
    value, error = hessian_trace(model, x, y, loss, estimator="pyhessian", probes=40)
    assert abs(value - reference(model, x, y, loss)[2].trace()) <= 4 * error
    refused(
        lambda: hessian_norm(model, x, y, loss, estimator="pyhessian", part="functional"),
        "functional",
    )


@pytest.mark.parametrize("ordered", [False, True])
def test_difference_norms_are_those_of_dense_differences(ordered):
    model, x, y, loss = case("pre mean gelu_tanh")
    hessians = sample_hessians(model, x, y, loss)
    order = torch.tensor([3, 1, 4, 0, 2]) if ordered else torch.arange(5)
    found = hessian_difference_norms(
        model, x, y, [1, 2, 4], order if ordered else None, loss, tolerance=1e-6, max_steps=300
    )
    assert found.sizes == [1, 2, 4] and len(found.mean) == len(found.step) == len(found.limit) == 3
    H = torch.stack([hessians[order[:k]].mean(0) for k in range(1, 6)])
    for k, mean, step, limit in zip(found.sizes, found.mean, found.step, found.limit, strict=True):
        differences = (mean, H[k - 1]), (step, H[k] - H[k - 1]), (limit, H[k - 1] - H[4])
        for estimate, exact in ((e, norms_of(matrix)) for e, matrix in differences):
            assert estimate.value == pytest.approx(float(exact), rel=1e-8) and estimate.converged
            assert estimate.lower <= float(exact) * (1 + 1e-10) and math.isnan(estimate.upper)
    again = hessian_difference_norms(
        model,
        x,
        y,
        [1, 2],
        order if ordered else None,
        loss,
        arriving=order[4],
        tolerance=1e-6,
        max_steps=300,
    )
    for k, step, limit, first in zip(again.sizes, again.step, again.limit, found.limit):
        exact = norms_of(hessians[order[4]] - H[k - 1]) / (k + 1)
        assert step.value == pytest.approx(float(exact), rel=1e-8) and limit.value == first.value
    for sizes in ([0], [5], [2, 7]):
        refused(lambda s=sizes: hessian_difference_norms(model, x, y, s, loss=loss), "sizes")
    for wrong in ([0] * 5, [0, 1, 2, 3, -1], [0, 1, 2, 3], list(range(6))):
        refused(lambda o=wrong: hessian_difference_norms(model, x, y, [2], o), "permutation")
    for late in (order[1], -1, 5):
        refused(
            lambda a=late: hessian_difference_norms(model, x, y, [2], order, loss, arriving=a),
            "arrive",
        )


@pytest.mark.slow
def test_half_trained_network():
    """Indefinite Hessians after a few steps of training: every value within 1e-3 of the dense one,
    both precisions.
    """
    model, (x, y) = tiny_vit(depth=2, d_model=8, d_ff=8).float(), examples(20, 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x.float()), y).backward()
        optimizer.step()
    model = model.double()
    spectra = torch.linalg.eigvalsh(sample_hessians(model, x, y))
    exact = spectra.abs().amax(1)
    assert (spectra[:, 0] < -0.1 * spectra[:, -1]).sum() >= 3
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-3)):
        found = per_sample_hessian_norms(model, x, y, dtype=dtype)
        error = (found.value.double() - exact).abs() / exact
        assert (
            (error <= tolerance) | ~found.converged
        ).all() and found.converged.double().mean() >= 0.95


class Adapter(nn.Module):
    """A pair of adapters that are both zero: their curvature is out of the gradient's sight."""

    def __init__(self, scale):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(16, 8), nn.Linear(8, 3), scale
        self.A, self.B = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        z = x.flatten(1)
        return self.head(torch.tanh(self.body(z) + self.scale * (z @ self.A.T @ self.B.T)))


def doubled(scale, times=2):
    """A network whose hidden units come `times` times, as Net2Net widens it."""
    layers = nn.Linear(16, 4), nn.Linear(4, 3)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 4 * times), nn.Tanh(), nn.Linear(4 * times, 3))
    with torch.no_grad():
        wide[1].weight.copy_(scale * torch.cat([layers[0].weight] * times))
        wide[1].bias.copy_(scale * torch.cat([layers[0].bias] * times))
        wide[3].weight.copy_(scale * torch.cat([layers[1].weight] * times, 1) / times)
        wide[3].bias.copy_(scale * layers[1].bias)
    return wide


@pytest.mark.parametrize("scale", [4, 10, 16])
@pytest.mark.parametrize("make", [Adapter, doubled, lambda s: doubled(s, 4)])
def test_a_gradient_in_an_invariant_subspace_hides_nothing(make, scale):
    torch.manual_seed(0)
    model, (x, y) = make(scale).double(), examples(6, 3)
    exact = norms_of(sample_hessians(model, x, y))
    found = per_sample_hessian_norms(model, x, y)
    kept = exact > 1e-6 * exact.max()  # saturated examples are rounding
    ratio = (found.value / exact)[kept]
    assert found.converged.all() and (ratio >= 1 - 1e-3).all() and (ratio <= 1 + 1e-9).all()
    if make is Adapter and scale == 16:  # the gradient alone misses the norm, and is content
        losses = Losses(model, x, y)
        ritz = lanczos(
            lambda V, rows, out: losses.sample_products(V, rows),
            losses.sample_gradients(),
            max_steps=30,
            done=never,
        )
        missed = ritz.value < 0.9 * exact
        assert missed.any() and (ritz.residual <= 1e-4 * ritz.value)[missed].all()


@pytest.mark.parametrize("scale", [1e-80, 1e-140, 2e-147])
def test_norms_far_below_one_do_not_vanish(scale):
    """Of size scale^2, down to 1e-294: squares of them are zero in double precision."""
    x, y = examples(n_classes=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)).double()
    unit = per_sample_hessian_norms(model, 1e-3 * x, y).value / 1e-6 * scale**2
    for certify in (False, True):
        found = per_sample_hessian_norms(model, scale * x, y, certify=certify)
        torch.testing.assert_close(found.value, unit, rtol=1e-2, atol=0)
        assert found.converged.all() and (found.value > 0).all()
    whole = hessian_norm(model, scale * x, y, certify=True)
    dense = hessian_norm(model, 1e-3 * x, y, estimator="exact").value / 1e-6 * scale**2
    assert whole.lower <= dense * 1.01 and dense * 0.99 <= whole.upper < 1.1 * dense
    density = spectral_density(model, scale * x, y, probes=2, steps=9)
    assert np.abs(density.nodes).max() == pytest.approx(whole.value, rel=0.1, abs=0)
    blocks = hessian_block_norms(model, scale * x, y)
    assert blocks.values[0, 0] == pytest.approx(whole.value, rel=1e-3, abs=0)


def test_exact_is_honest_about_its_residual(monkeypatch):
    """A matrix that the products do not have is no eigenvalue of theirs."""
    model, (x, y) = random_vit(5), examples(3)
    dense = Losses.dense
    monkeypatch.setattr(Losses, "dense", lambda self, part="full": 1.2 * dense(self, part))
    found = hessian_norm(model, x, y, estimator="exact")
    assert not found.converged and found.residual == pytest.approx(found.value / 6, rel=1e-6)
