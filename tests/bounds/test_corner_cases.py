"""Networks on which a bound has once been below an exact norm, and their kin."""

import pytest
import torch
from bounded import moved
from exact import exact_norms, norms_of, sample_hessians
from torch import Tensor, nn
from torch.nn import functional as F

from utils.bounds import RUNGS, hessian_bounds
from utils.calculus.nodes.base import Unknown

F64 = torch.float64


class Chosen(nn.Module):
    """A function of named parts and the input."""

    def __init__(self, function, parts: dict, buffers: dict | None = None):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)


def seeded_linear(*sizes: int, zero: bool = False, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(*sizes, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.weight.mul_(not zero)
    return layer


def two_zero_layers():
    parts = {"a": seeded_linear(3, 3, zero=True), "b": seeded_linear(3, 3, zero=True)}
    parts["c"] = seeded_linear(3, 3)
    return Chosen(lambda net, x: net.c(torch.tanh(net.b(net.a(x)))), parts)


def zero_adapters():
    parts = {"A": torch.zeros(2, 3), "B": torch.zeros(3, 2), "head": seeded_linear(3, 3)}
    return Chosen(lambda net, x: net.head(F.gelu(x @ (net.B @ net.A).T)), parts)


def zero_gain():
    norm = nn.LayerNorm(3, bias=False)
    nn.init.zeros_(norm.weight)
    parts = {"norm": norm, "a": seeded_linear(3, 3, zero=True), "head": seeded_linear(3, 3)}
    return Chosen(lambda net, x: net.head(F.silu(net.a(net.norm(x)))), parts)


def unknown_after_zeros():
    parts = {"a": seeded_linear(3, 3, zero=True), "b": seeded_linear(3, 3, zero=True)}
    mix = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 3.0]])
    return Chosen(
        lambda net, x: torch.einsum("bi,ij->bj", net.b(net.a(x)), net.mix), parts, {"mix": mix}
    )


ZERO = {f.__name__: f for f in (two_zero_layers, zero_adapters, zero_gain, unknown_after_zeros)}


def answered(model, x, y, loss="cross_entropy", exact=None, rungs=RUNGS[1:], **options):
    """The rungs that answer, none below the exact norms."""
    exact = exact_norms(model, x, y, loss) if exact is None else exact
    found = []
    for rung in rungs:
        more = {"confidence": 1 - 1e-9} if rung == "majorant" else {}
        try:
            bound = hessian_bounds(model, x, y, loss, rung, **options, **more).values
        except Unknown:
            continue
        assert (bound >= exact * (1 - 1e-9)).all(), rung
        found.append(rung)
    return found


@pytest.mark.parametrize("name", ZERO)
def test_a_derivative_of_zero_is_no_constant(name):
    """Behind two factors of 0 a value has no first derivative, and a second one."""
    model = ZERO[name]().double()
    x, y = torch.randn(2, 3, dtype=F64), torch.tensor([0, 2])
    assert exact_norms(model, x, y).min() > 1e-3
    found = answered(model, x, y)
    assert found == ([] if name == "unknown_after_zeros" else list(RUNGS[1:]))


def attention(fill: float):
    def forward(net, x):
        scores = (net.q(x) @ net.k(x).mT).masked_fill(net.mask, fill)
        return net.head((scores.softmax(-1) @ net.v(x)).mean(1))

    parts = {name: seeded_linear(3, 3, seed=i) for i, name in enumerate(("q", "k", "v", "head"))}
    return Chosen(forward, parts, {"mask": torch.ones(4, 4).triu(1).bool()})


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [None, ["q.*"], ["k.*"]])
@pytest.mark.parametrize("fill", [0.0, -2.0, -1e4, -3e38, -torch.inf])
def test_masked_keys_that_keep_a_weight(fill, parameters):
    model = attention(fill).double()
    x = torch.ones(1, 4, 3, dtype=F64) + 1e-3 * torch.randn(2, 4, 3, dtype=F64)
    y = torch.tensor([0, 2])
    H = sample_hessians(model, x, y)
    names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
    kept = [parameters is None or n.startswith(parameters[0][:2]) for n in names]
    exact = norms_of(H[:, kept][:, :, kept])
    assert len(answered(model, x, y, exact=exact, parameters=parameters)) == 4


@pytest.mark.parametrize("tokens", [1, 16])
def test_one_hot_targets_of_tokens(tokens):
    model = nn.Sequential(seeded_linear(3, 4), seeded_linear(4, 3, seed=1)).double()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    x = torch.ones(2, tokens, 3, dtype=F64)
    y = torch.zeros(2, tokens, dtype=torch.long)
    assert len(answered(model, x, y, "mse")) == 4
    assert len(answered(model, x, y, "mse", rungs=RUNGS[1:3], radius=1e-6)) == 2


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_one_map_of_two_stands_still(size):
    """tanh between a map of zeros, which moves in a ball, and a constant one; the norm is that of
    the weights before both."""
    parts = {"a": seeded_linear(3, 3, zero=True), "b": seeded_linear(3, 3, zero=True)}
    fixed = {"fixed": size * torch.eye(3)}
    model = Chosen(lambda net, x: F.linear(torch.tanh(net.b(net.a(x))), net.fixed), parts, fixed)
    model = model.double()
    x, y = torch.eye(3, dtype=F64)[:2], torch.tensor([0, 2])
    generator = torch.Generator().manual_seed(0)
    for radius in (1e-3, 0.3):
        largest = torch.zeros(2, dtype=F64)
        for u, v in torch.randn(40, 2, 3, generator=generator, dtype=F64):
            step = torch.outer(u, v).flatten()
            step = torch.cat([torch.zeros(9, dtype=F64), radius * step / step.norm()])
            H = sample_hessians(moved(model, step), x, y)[:, :9, :9]
            largest = torch.maximum(largest, norms_of(H))
        options = {"parameters": ["a.*"], "radius": radius, "rungs": RUNGS[1:3]}
        assert len(answered(model, x, y, exact=largest, **options)) == 2


@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0])
def test_one_logit_in_a_ball(radius):
    """bce of one linear map: its curvature grows towards the logit 0, where the worst point is."""
    model = Chosen(lambda net, x: net.a(x), {"a": seeded_linear(3, 1)}).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    f = model(x).detach()[:, 0]
    nearest = (f.abs() - radius * x.norm(dim=1)).clamp_min(0)
    exact = nearest.sigmoid() * (-nearest).sigmoid() * x.square().sum(1)
    options = {"radius": radius, "rungs": RUNGS[1:3]}
    assert len(answered(model, x, y, "bce", exact, **options)) == 2
