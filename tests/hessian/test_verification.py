"""Derivatives that are not the loss's are noticed, and those that are pass."""

import pytest
import torch
from networks import NETWORKS, images, randomised
from torch import nn

from utils.hessian import Losses, hessian_norm, per_sample_hessian_norms
from utils.hessian.verification import derivatives_hold

X, Y = images(10), torch.arange(10) % 3


class Body(nn.Module):
    """`read` between two linear maps."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.first, self.head = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.read(self.first(x.flatten(1))))


class Quiet(torch.autograd.Function):
    """The identity with half its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 0.5 * tangent


WRONG = {
    "a branch behind detach": lambda z: torch.tanh(z) + torch.sin(2 * z).detach(),
    "straight-through rounding": lambda z: z + (torch.round(4 * z) / 4 - z).detach(),
    "half a gradient": lambda z: Quiet.apply(torch.tanh(z)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_derivative_is_never_called_converged(name):
    model = randomised(Body(WRONG[name]), 1, 2.0)
    assert not derivatives_hold(Losses(model, X, Y))
    assert not per_sample_hessian_norms(model, X, Y).converged.any()
    assert not per_sample_hessian_norms(model, X, Y, certify=True).converged.any()
    for estimator in ("lanczos", "exact"):
        assert not hessian_norm(model, X, Y, estimator=estimator).converged


def test_a_padding_row_that_is_read():
    """Its gradient is left out, whatever it does to the loss."""
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3))
    model = randomised(model, 2)
    tokens = torch.tensor([[0, 1, 2], [3, 0, 5], [6, 6, 0]])
    assert not derivatives_hold(Losses(model, tokens, Y[:3]))
    assert derivatives_hold(Losses(model, tokens.clamp_min(1), Y[:3]))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", ["pre cls gelu", "post cls relu", "mlp", "encoder pre"])
def test_derivatives_of_networks_pass(name, scale):
    """Small, large and no weights, and saturated outputs."""
    model = NETWORKS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    assert derivatives_hold(Losses(model, X, Y))
