"""Losses of tiny networks as functions of their weights, and all orders of a few examples."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from utils.hessian import Losses
from utils.networks import build_model


@pytest.fixture(scope="session")
def all_orders():
    """n -> (n!, n)."""
    return lambda n: np.array(list(itertools.permutations(range(n))))


@pytest.fixture(scope="session")
def vit_losses():
    """(n, seed) -> losses of a tiny ViT."""

    def build(n=40, seed=0):
        torch.manual_seed(seed)
        sizes = {"image_size": 4, "channels": 1, "patch_size": 2, "n_classes": 3}
        model = build_model("vit", **sizes, depth=1, n_heads=2, d_model=4, d_ff=4)
        return Losses(model, torch.randn(n, 1, 4, 4), torch.randint(0, 3, (n,)))

    return build


class Linear(nn.Module):
    """Quadratic in its weights under mse."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x)


@pytest.fixture(scope="session")
def linear_losses():
    """(n, seed) -> losses of a linear network."""

    def build(n=12, seed=0):
        torch.manual_seed(seed)
        x = torch.randn(n, 3) * torch.rand(n, 1) * 3
        return Losses(Linear(), x, torch.randint(0, 2, (n,)), "mse")

    return build
