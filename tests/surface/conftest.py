"""Losses of tiny networks as functions of their weights, and all orders of a few examples."""

import itertools

import numpy as np
import pytest
import torch
from networks import examples, images, labels, tiny_linear, tiny_vit

from utils.hessian import Losses


@pytest.fixture(scope="session")
def all_orders():
    """n -> (n!, n)."""
    return lambda n: np.array(list(itertools.permutations(range(n))))


@pytest.fixture(scope="session")
def vit_losses():
    """(n, seed) -> losses of a tiny ViT."""
    return lambda n=40, seed=0: Losses(tiny_vit(seed), *examples(n, seed))


@pytest.fixture(scope="session")
def linear_losses():
    """(n, seed) -> losses of a linear network, quadratic in its weights, on inputs of different
    size."""

    def build(n=12, seed=0):
        x = images(n, channels=3, side=1, seed=seed).flatten(1)
        x = x * torch.linspace(0.1, 3, n, dtype=torch.float64)[:, None]
        return Losses(tiny_linear(seed, d_in=3, n_classes=2), x, labels(n, 2), "mse")

    return build
