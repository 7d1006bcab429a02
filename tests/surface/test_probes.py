"""Weights that stand for a neighbourhood, losses there, and the most that a label would cost."""

import math

import numpy as np
import torch
from networks import vit_pilot
from torch import nn

from utils.hessian import Losses
from utils.networks import build_model
from utils.sample_size import label_ceiling
from utils.surface.probes import neighbourhood, probe_losses


def test_probes_lie_uniformly_in_the_ball():
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    probes = neighbourhood(w, 0.7, 4000, seed=1)
    length = (probes - w).norm(dim=1)
    assert probes.shape == (4000, 3) and (length <= 0.7 * (1 + 1e-12)).all()
    share = (length / 0.7) ** 3  # the mass within each radius: uniform on [0, 1]
    assert abs(float(share.mean()) - 0.5) <= 4 / math.sqrt(12 * 4000)
    for level in (0.1, 0.5, 0.9):
        assert abs(float((share <= level).double().mean()) - level) <= 4 * math.sqrt(
            level * (1 - level) / 4000
        )
    assert ((probes - w).mean(0).abs() <= 4 * 0.7 / math.sqrt(5 * 4000)).all()
    assert torch.equal(probes, neighbourhood(w, 0.7, 4000, seed=1))
    assert not torch.equal(probes, neighbourhood(w, 0.7, 4000, seed=2))
    assert torch.equal(neighbourhood(w, 0.0, 8), w[None])
    many = neighbourhood(torch.zeros(5000, dtype=torch.float64), 2.0, 3)
    assert (many.norm(dim=1) <= 2 * (1 + 1e-12)).all() and (many.norm(dim=1) > 1.99).all()


def test_probe_losses():
    model, x, y = vit_pilot(depth=1)
    losses = Losses(model, x, y)
    probes = neighbourhood(losses.w, 0.5, 3)
    values = probe_losses(losses, probes)
    assert values.shape == (3, 12) and values.dtype == np.float64
    with torch.no_grad():
        for w, row in zip(probes, values, strict=True):
            moved = build_model("vit", **vars(model.config)).double()
            nn.utils.vector_to_parameters(w, moved.parameters())
            direct = nn.functional.cross_entropy(moved(x.double()), y, reduction="none")
            np.testing.assert_allclose(row, direct.numpy(), rtol=1e-10)


def test_label_ceiling():
    """Every labelling stays below it at every probe, and one attains it."""
    model, x, y = vit_pilot(9)
    losses = Losses(model, x, y)
    probes = neighbourhood(losses.w, 0.3, 3)
    ceiling = label_ceiling(losses, probes, 3)
    every = np.stack(
        [probe_losses(Losses(model, x, torch.full_like(y, c)), probes) for c in range(3)]
    )
    np.testing.assert_allclose(ceiling, every.max((0, 1)), rtol=1e-12)
    assert torch.equal(losses.y, y)
