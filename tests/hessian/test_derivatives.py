"""Losses, gradients and products against double backward, on real networks in float64."""

import sys
from types import MethodType

import pytest
import torch
from exact import F64, TIGHT, close, exact_norms, losses_of, reference, sample_hessians
from networks import CASES, Call, case, examples, random_vit, randomised, small_first
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.bounds import hessian_bounds
from utils.hessian import (
    Losses,
    hessian_vector_product,
    per_sample_losses,
)
from utils.hessian.derivatives import dense_hessian, per_sample_hessian_vector_product


@pytest.mark.parametrize("name", small_first(CASES, ("two blocks", "encoder post", "fused mse")))
def test_derivatives_are_double_backward(name):
    model, x, y, loss = case(name)
    value, g, H = reference(model, x, y, loss)
    losses = Losses(model, x, y, loss, chunk_size=2)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(len(g), generator=generator, dtype=F64)

    close(losses.values(), losses_of(model, x, y, loss).detach(), 1e-12)
    found, gradient = losses.value_and_gradient()
    close(found, value, 1e-12)
    close(gradient, g)
    close(losses.gradient(), g)

    ours = dense_hessian(model, x, y, loss)
    close(ours, H)
    assert (ours - ours.T).abs().max() <= TIGHT * ours.abs().max()
    assert H.abs().max() > 1e-3  # a Hessian of zeros would agree with anything
    close(hessian_vector_product(model, x, y, v, loss), H @ v)

    # each sample with a vector of its own, and a choice of rows
    V = torch.randn(len(x), len(g), generator=generator, dtype=F64)
    each = [reference(model, x[i : i + 1], y[i : i + 1], loss) for i in (0, 3)]
    products, gradients = losses.sample_products(V), losses.sample_gradients()
    assert products.shape == gradients.shape == (len(x), len(g))
    for i, (_, g_i, H_i) in zip((0, 3), each, strict=True):
        close(products[i], H_i @ V[i])
        close(gradients[i], g_i)
    close(gradients.mean(0), g)
    rows = torch.tensor([3, 0])
    close(losses.sample_products(V[rows], rows), products[rows], 1e-12)
    close(losses.sample_gradients(rows=rows), gradients[rows], 1e-12)
    close(losses.product(v, rows=rows), (each[0][2] + each[1][2]) @ v / 2)
    close(losses.gradient(rows=rows), (each[0][1] + each[1][1]) / 2)
    close(losses.values(rows=rows), losses.values()[rows], 1e-12)
    weights = torch.tensor([0.7, -2.0], dtype=F64)
    found, gradient = losses.value_and_gradient(rows=rows, weights=weights)
    close(found, weights @ losses.values()[rows], 1e-12)
    close(gradient, weights @ gradients[rows])
    for part in ("full", "gauss_newton", "functional"):
        of_samples = losses.sample_products(v.expand(2, -1), rows, part)
        close(losses.hessian(rows=rows, part=part, weights=weights)(v), weights @ of_samples)


@pytest.mark.parametrize("name", small_first(n for n in CASES if "relu" not in n))
def test_products_are_differences_of_gradients(name):
    """Central differences of the gradient, at the model's weights and away from them."""
    model, x, y, loss = case(name)
    losses = Losses(model, x, y, loss)
    generator = torch.Generator().manual_seed(3)
    v, u = torch.randn(2, losses.P, generator=generator, dtype=F64)
    v = v / v.norm()
    for w in (losses.w, losses.w + 0.1 * u):
        h = 1e-4
        # Richardson: the error of a central difference is h^2 times a third derivative
        d = [
            (losses.gradient(losses.w + (w - losses.w) + s * v) - losses.gradient(w - s * v))
            / (2 * s)
            for s in (h, 2 * h)
        ]
        close(losses.product(v, w), (4 * d[0] - d[1]) / 3, 1e-7)
        slope = (losses.values(w + h * v).mean() - losses.values(w - h * v).mean()) / (2 * h)
        assert abs(slope - losses.gradient(w) @ v) <= 1e-6 * losses.gradient(w).norm()
        sample_slope = (losses.values(w + h * v) - losses.values(w - h * v)) / (2 * h)
        close(losses.sample_gradients(w) @ v, sample_slope, 1e-6)


def test_layer_norm_trap():
    """`torch.func.hessian` of a module with an affine `F.layer_norm` is wrong, silently; ours is
    not.

    Its reverse-over-reverse and forward-over-jacrev compositions lose terms; this is why
    `jvp(grad)` is used.
    """
    model, x, y, loss = case("fused")
    named = {n: p.detach() for n, p in model.named_parameters()}
    shapes = {n: t.shape for n, t in named.items()}
    flat = torch.cat([t.reshape(-1) for t in named.values()])

    def value(w):
        parts = w.split([s.numel() for s in shapes.values()])
        point = {n: t.reshape(s) for t, (n, s) in zip(parts, shapes.items(), strict=True)}
        return losses_of(lambda x: functional_call(model, point, (x,)), x, y, loss).mean()

    _, _, H = reference(model, x, y, loss)
    with sdpa_kernel(SDPBackend.MATH):
        trap = torch.func.hessian(value)(flat)
    scale = H.abs().max()
    assert (trap - trap.T).abs().max() > 1e-3 * scale
    assert (trap - H).abs().max() > 1e-3 * scale
    close(dense_hessian(model, x, y, loss), H)


def test_functions_by_name_and_options():
    """The named functions are the class's methods; float32 and integer inputs are taken as they
    come.
    """
    model, x, y, loss = case("pre mean gelu_tanh")
    V = torch.ones(len(x), Losses(model, x, y).P, dtype=F64)
    H = sample_hessians(model, x[:2], y[:2], loss)
    close(per_sample_hessian_vector_product(model, x, y, V, loss)[:2], H.sum(2))
    close(per_sample_losses(model, x, y, loss), losses_of(model, x, y, loss).detach())
    # float32 inputs: computed in float64 on the rounded values
    single = per_sample_losses(model, x.float(), y, loss)
    assert single.dtype == F64
    assert torch.equal(single, per_sample_losses(model, x.float().double(), y, loss))
    # float32 on request: near, and not the same
    low = hessian_vector_product(model, x, y, V[0].float(), loss, dtype=torch.float32)
    exact = hessian_vector_product(model, x, y, V[0], loss)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().max() <= 1e-4 * exact.abs().max()

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.table(x).mean(1))

    tokens, ids = randomised(Tokens(), 4), torch.tensor([[0, 3], [5, 5], [1, 2], [0, 1], [4, 4]])
    close(dense_hessian(tokens, ids, y), reference(tokens, ids, y, "cross_entropy")[2])


@pytest.mark.parametrize("name", ["pre cls gelu", "post mean gelu mse", "mlp"])
def test_both_engines_give_the_same(name):
    """The chain, and automatic differentiation of the same network with the chain put aside."""
    model, x, y, loss = case(name)
    known, unknown = Losses(model, x, y, loss), Losses(model, x, y, loss)
    unknown.chain = None
    assert known.engine == "chain" and unknown.engine == "jvp(grad)"
    V = torch.randn(len(x), known.P, dtype=F64, generator=torch.Generator().manual_seed(2))
    for part in ("full", "gauss_newton", "functional"):
        close(known.product(V[0], part=part), unknown.product(V[0], part=part), 1e-9)
        close(known.sample_products(V, part=part), unknown.sample_products(V, part=part), 1e-9)
    close(known.sample_gradients(), unknown.sample_gradients())


WIDTH = 1.0


class Clipped(nn.Module):
    """What its forward pass does stands in a private attribute, in one of the class, in a global,
    or in a private tensor."""

    width = 1.0

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(16, 4), nn.Linear(4, 3)
        self._width, self._scale = 1.0, torch.ones(())

    def forward(self, x):
        width = self._width * self.width * WIDTH * self._scale
        return self.head(torch.tanh(width * self.a(x.flatten(1))))


@pytest.mark.parametrize("place", ["private", "class", "global", "tensor"])
def test_networks_that_differ_outside_their_layers(monkeypatch, place):
    """A chain that was read for one is not the other's."""
    x, y = examples()
    model = randomised(Clipped())
    before = Losses(model, x, y).chain
    if place == "private":
        model._width = 3.0
    elif place == "class":
        monkeypatch.setattr(Clipped, "width", 3.0)
    elif place == "global":
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", 3.0)
    else:
        model._scale = torch.tensor(3.0)
    assert Losses(model, x, y).chain is not before
    exact = reference(model, x, y, "cross_entropy")[2]
    close(dense_hessian(model, x, y), exact)
    above = hessian_bounds(model, x, y, rung="majorant", confidence=1 - 1e-9).values
    assert (above >= exact_norms(model, x, y) * (1 - 1e-9)).all()


def test_a_changed_network_is_read_anew():
    """A replaced layer, a patched forward, a parametrisation: the chain is another, the answer
    right."""
    x, y = examples()

    class Doubled(nn.Linear):
        def forward(self, z):
            return 2 * super().forward(z)

    def replaced(model):
        model.blocks[0].mlp.fc1 = randomised(Doubled(4, 4), 3)

    def patched(model):
        model.norm.forward = MethodType(lambda self, z: z * self.weight + self.bias, model.norm)

    def parametrised(model):
        torch.nn.utils.parametrize.register_parametrization(
            model.head, "weight", Call(lambda t: 2 * t)
        )

    for change in (replaced, patched, parametrised):
        model = random_vit(2, depth=int(change is replaced))
        before = Losses(model, x, y).chain
        change(model)
        assert Losses(model, x, y).chain is not before
        close(dense_hessian(model, x, y), reference(model, x, y, "cross_entropy")[2])
