"""Which engine a module is measured by: the calculus, forward over reverse, double backward, a
loop.
"""

import pytest
import torch
from exact import close, norms_of, reference, sample_hessians
from networks import examples, tiny_mlp
from refusal import refused
from torch import nn

from utils.hessian import Losses, hessian_norm, per_sample_hessian_norms
from utils.hessian.derivatives import dense_hessian


class Reverse(torch.autograd.Function):
    """tanh with a double backward and no forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (out,) = ctx.saved_tensors
        return g * (1 - out**2)


class Net(nn.Module):
    """Two linear layers, of two units, with `between` in the middle."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(16, 2), nn.Linear(2, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x.flatten(1))))


def masked(h):
    h[h < 0] = 0
    return h.tanh()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(4, 1, batch_first=True), nn.Linear(1, 3)

    def forward(self, x):
        return self.head(self.cell(x[:, 0])[0][:, -1])


class Padded(nn.Module):
    """Forward and reverse mode disagree on the padding row of this embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)
        with torch.no_grad():
            self.table.weight[0] = 2.0

    def forward(self, x):
        return self.head(self.table((x.flatten(1)[:, :5].abs() * 3).long().clamp(max=6)).mean(1))


NETWORKS = {
    "mlp": (
        tiny_mlp,
        "chain",
        "jvp(grad)",
    ),
    "tanh": (lambda: Net(torch.tanh), "chain", "jvp(grad)"),
    "no-forward-mode": (lambda: Net(Reverse.apply), "chain", "double backward"),
    "padded": (Padded, "chain", "double backward"),
    "masked": (lambda: Net(masked), "loop over examples", "loop over examples"),
    "recurrent": (Recurrent, "loop over examples", "loop over examples"),
}


def build(name):
    torch.manual_seed(0)
    make, traced, automatic = NETWORKS[name]
    return make().double(), *examples(3), traced, automatic


@pytest.mark.parametrize("name", NETWORKS)
def test_every_engine_is_right_and_says_its_name(name):
    """The chain where it can be read; and with it put aside, automatic differentiation."""
    model, x, y, traced, automatic = build(name)
    hessians = sample_hessians(model, x, y)
    for engine in (traced, automatic):
        losses = Losses(model, x, y)
        if engine == automatic:
            losses.chain = None
        assert losses.engine == engine == losses.moving(["*.weight"]).engine
        close(losses.dense(), hessians.mean(0))
        V = torch.randn(3, losses.P, dtype=torch.float64)
        close(losses.sample_products(V), torch.einsum("nij,nj->ni", hessians, V))
        _, g, _ = reference(model, x[2:], y[2:], "cross_entropy")
        close(losses.sample_gradients()[2], g)
        parts = [losses.dense(part) for part in ("gauss_newton", "functional")]
        close(sum(parts), hessians.mean(0))
        assert torch.linalg.eigvalsh((parts[0] + parts[0].T) / 2)[0] > -1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_name_the_engine(name):
    model, x, y, engine, _ = build(name)
    found = per_sample_hessian_norms(model, x, y)
    assert found.engine == hessian_norm(model, x, y).engine == engine
    assert "engine" not in found.columns() and set(found.columns()) < set(vars(found))
    exact = norms_of(sample_hessians(model, x, y))
    torch.testing.assert_close(found.value, exact, rtol=1e-6, atol=1e-12)


def test_what_cannot_be_traced_says_why():
    model, x, y, _, _ = build("masked")
    losses = Losses(model, x, y)
    assert losses.chain is None and losses.untraced and "\n" not in losses.untraced


def test_a_model_without_a_second_derivative_is_refused():
    (x, y), roots = examples(), Net(lambda h: (h - h.detach()).sqrt())
    refused(lambda: per_sample_hessian_norms(roots, x, y), "finite")


def test_the_input_is_left_alone():
    def forward(z):
        z = z.flatten(1)
        z -= z.mean(1, keepdim=True)
        return z

    (x, y), model = examples(), nn.Sequential(nn.Identity(), nn.Linear(16, 3)).double()
    model[0].forward = forward
    kept = x.clone()
    centred = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
    close(dense_hessian(model, x.float(), y), dense_hessian(model[1], centred, y), 1e-6)
    assert torch.equal(x, kept)


def test_buffers_of_other_types_do_not_set_the_precision():
    """A mask is a boolean buffer: the walk still has the type of the weights."""

    class Masked(Net):
        def __init__(self):
            super().__init__(torch.tanh)
            self.register_buffer("mask", torch.tensor([True, False]))
            self.between = lambda h: torch.tanh(h) * self.mask

    model, (x, y) = Masked().double(), examples()
    losses = Losses(model, x, y, parameters=["last.*"])
    assert losses.engine == "chain"
    close(losses.dense(), sample_hessians(model, x, y).mean(0)[-losses.P :, -losses.P :])
