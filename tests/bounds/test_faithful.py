"""What a trace could lose, and what a bound could take for granted: measured right, or bounded."""

import pytest
import torch
import torch.nn.functional as F
from exact import exact_norms, sample_hessians
from torch import nn

from utils.bounds import hessian_bounds
from utils.hessian import Losses, per_sample_hessian_norms

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, 3, generator=GENERATOR, dtype=F64)
Y = torch.tensor([0, 1, 2, 0])


class Net(nn.Module):
    """`read` of tokens (n, 3, 3), then a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 3)
        self.double().eval()

    def forward(self, x):
        return self.head(self.read(x))


def reading(read):
    """A network of a class of its own, so that its chain is read once."""
    return type("Reading", (Net,), {"read": read})()


def frozen(net, x):
    with torch.no_grad():
        h = torch.tanh(net.first(x))
    return (h + net.first(x)).mean(1)


def watched(net, x):
    h = torch.tanh(net.first(x))
    if h.requires_grad:
        h.register_hook(lambda gradient: 0.5 * gradient)
    return h.mean(1)


@pytest.mark.parametrize("read", [frozen, watched])
def test_what_a_trace_loses_is_noticed(read):
    """A block without gradient and a hook: the chain steps aside, in a sentence."""
    model = reading(read)
    try:
        losses = Losses(model, X, Y)
        assert losses.chain is None and "another gradient" in losses.untraced
        norms = per_sample_hessian_norms(model, X, Y).value
        torch.testing.assert_close(norms, exact_norms(model, X, Y), rtol=1e-6, atol=1e-12)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
    with pytest.raises(ValueError, match="another gradient"):
        hessian_bounds(model, X, Y)


def test_bounds_of_coupled_examples_are_refused():
    """Who reads the mean over the batch, and who reads the next example."""
    for read in (
        lambda net, x: torch.tanh(net.first(x - x.mean(0))).mean(1),
        lambda net, x: torch.tanh(net.first(x.cumsum(0))).mean(1),
    ):
        with pytest.raises(ValueError, match="depends on the other examples"):
            hessian_bounds(reading(read), X, Y)


def test_complex_buffers_stay_complex():
    class Waves(Net):
        def __init__(self):
            super().__init__()
            angles = torch.arange(3, dtype=F64)
            self.register_buffer("waves", torch.polar(torch.ones(3, dtype=F64), angles))

        def read(self, x):
            return (self.first(x) * self.waves).abs().mean(1)

    model = Waves()
    expected = F.cross_entropy(model(X), Y, reduction="none")
    torch.testing.assert_close(Losses(model, X, Y).values(), expected.detach())
    assert model.waves.is_complex()


def shared(net, x):
    return F.layer_norm(net.first(x), (3,), net.norm.weight, net.norm.weight).mean(1)


READS = {
    "softmax over another axis": lambda net, x: (4 * net.first(x)).softmax(1)[:, 0],
    "the last row": lambda net, x: torch.tanh(net.first(x))[:, -1:].sum(1),
    "gain and bias are one": shared,
    "weight and bias are one": lambda net, x: F.linear(
        x, net.first.weight, net.first.weight[0]
    ).mean(1),
    "a boolean gate": lambda net, x: (torch.tanh(net.first(x)) * (x > 0)).mean(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
def test_bounds_are_above_or_refused(name):
    model = reading(READS[name])
    norms = exact_norms(model, X, Y)
    torch.testing.assert_close(Losses(model, X, Y).dense(), sample_hessians(model, X, Y).mean(0))
    for rung in ("prior", "activations", "tangents", "majorant"):
        for loss in ("cross_entropy", "mse"):
            try:
                bound = hessian_bounds(model, X, Y, loss, rung).values
            except ValueError as refusal:
                assert "\n" not in str(refusal)
                continue
            exact = (
                norms
                if loss == "cross_entropy"
                else per_sample_hessian_norms(model, X, Y, loss).value
            )
            assert (bound >= exact * (1 - 1e-9)).all()
