"""Losses, and what a model has to satisfy."""

import pytest
import torch
from networks import images, randomised, tiny_encoder, tiny_vit
from refusal import refused
from torch import nn
from torch.nn import functional as F

from utils.networks.contract import (
    prepared_copy,
    refuse_dropout,
    refuse_random_or_batch_dependent,
    second_order_mode,
)
from utils.networks.losses import loss_from_logits


def test_losses():
    f = torch.randn(5, 4, dtype=torch.float64)
    f[0] = torch.tensor([1000.0, 0, -1000, 3])
    y = torch.tensor([1, 0, 3, 2, 1])
    torch.testing.assert_close(loss_from_logits(f, y), F.cross_entropy(f, y, reduction="none"))
    target = F.one_hot(y, 4).double()
    torch.testing.assert_close(
        loss_from_logits(f, y, "mse"), F.mse_loss(f, target, reduction="none").mean(1)
    )
    refused(lambda: loss_from_logits(f, y, "hinge"), "hinge")


def test_losses_of_tokens():
    """The mean over an example's tokens, of which some do not count; targets that are numbers."""
    f = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.tensor([[1, -100, 3], [0, 0, 2]])
    expected = torch.stack([F.cross_entropy(a, b) for a, b in zip(f, y)])
    torch.testing.assert_close(loss_from_logits(f, y), expected)
    target = torch.randn(2, 3, 4, dtype=torch.float64)
    squares = (f - target).square().mean((1, 2))
    torch.testing.assert_close(loss_from_logits(f, target, "mse"), squares)


def test_prepared_copy_and_mode():
    model = randomised(tiny_vit()).float().train()
    model.pos.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    twin = prepared_copy(model)
    assert not twin.training and twin.pos.requires_grad and twin.head.weight.grad is None
    assert all(p.dtype == torch.float64 for p in twin.parameters())
    with torch.no_grad():
        twin.pos.zero_()
    assert model.training and not model.pos.requires_grad and model.pos.abs().min() > 0
    assert model.pos.dtype == torch.float32 and bool((model.head.weight.grad == 1).all())
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        with second_order_mode():
            assert not torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(KeyError), second_order_mode():
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    torch.backends.mha.set_fastpath_enabled(True)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


@pytest.mark.parametrize(
    "model, said",
    [
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16).eval()), "batch statistics"),
        (Call(lambda x: x.sum(1)), "(n, classes)"),
        (Call(lambda x: x / 0), "finite"),
        (Call(lambda x: x + torch.rand(())), "two outputs"),
        (Call(lambda x: x - x.mean(0)), "rest of the batch"),
    ],
)
def test_what_is_refused(model, said):
    refused(lambda: refuse_random_or_batch_dependent(model.double(), images(4)), said)


@pytest.mark.parametrize("build", [tiny_vit, tiny_encoder])
def test_what_is_accepted(build):
    refuse_random_or_batch_dependent(build(), images(4))
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, 3)).double()
    refuse_random_or_batch_dependent(dropout, images(4))
    refuse_dropout(dropout)


def test_dropout_is_judged_by_what_it_does():
    """In eval mode it does nothing; to train with it is refused."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3)).double()
    refuse_random_or_batch_dependent(model.eval(), images(4))
    refused(lambda: refuse_dropout(model), "dropout with p = 0.1")
    model[1].train()
    refused(lambda: refuse_random_or_batch_dependent(model, images(4)), "two outputs")
