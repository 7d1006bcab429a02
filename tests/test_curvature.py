"""Derivatives, norms and certificates against dense matrices, on real networks in float64.

The reference is double backward through `torch.autograd` with torch's own losses; nothing of `utils.curvature`
is in it. Forward over reverse, which the module uses, has to agree with it to rounding.
"""

import copy
import itertools
import math
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from refusal import refused
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils import curvature
from utils.curvature import (
    Losses,
    dense_hessian,
    hessian_block_norms,
    hessian_difference_norms,
    hessian_norm,
    hessian_trace,
    hessian_vector_product,
    lanczos,
    lanczos_epsilon,
    operations,
    operator_norm,
    per_sample_gradients,
    per_sample_hessian_norms,
    per_sample_hessian_vector_product,
    per_sample_losses,
    spectral_density,
)
from utils.models import build_model

F64 = torch.float64
TIGHT = 1e-10


class Fused(nn.Module):
    """Fused attention and torch's layer norm with an affine weight: what a user's model looks like."""

    def __init__(self, d=4, K=3):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(4, d), nn.Linear(d, 3 * d), nn.Linear(d, K)
        self.scale, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.d = d

    def forward(self, x):
        h = self.embed(x.unflatten(-1, (2, 2)).flatten(1).unflatten(1, (4, 4)))  # (B, 4, d)
        z = F.layer_norm(h, (self.d,), self.scale, self.shift)
        q, k, v = self.qkv(z).unflatten(-1, (3, 2, self.d // 2)).permute(2, 0, 3, 1, 4)  # (B, 2, 4, d/2)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.layer_norm(h, (self.d,), self.scale, self.shift).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, whose eval mode takes a fast path without derivatives; an object is returned."""

    def __init__(self, norm_first):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(self.encoder(x.reshape(len(x), 4, 4))[:, 0]), hidden=None)


def vit(**sizes):
    small = dict(image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4)
    return build_model("vit", **(small | {"eps": 1e-2} | sizes))


def randomised(model, seed, scale=0.8):
    """Every parameter random: biases and LayerNorm included, so that no term of a derivative is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            offset = 1.0 if ("norm" in name and name.endswith("weight")) or name == "scale" else 0.0
            p.copy_(offset + scale * torch.randn(p.shape, generator=generator, dtype=F64))
    return model


def samples(seed=0, n=5, K=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=F64), torch.randint(0, K, (n,), generator=generator)


CASES = {
    "vit-pre-cls-gelu-depth2": (lambda: vit(depth=2), "cross_entropy"),
    "vit-pre-mean-relu": (lambda: vit(pool="mean", activation="relu"), "cross_entropy"),
    "vit-post-cls-tanh": (lambda: vit(norm="post", activation="gelu_tanh"), "cross_entropy"),
    "vit-post-mean-gelu-depth2-mse": (lambda: vit(depth=2, norm="post", pool="mean"), "mse"),
    "vit-pre-cls-relu-mse": (lambda: vit(activation="relu"), "mse"),
    "mlp": (lambda: build_model("mlp", d_in=16, width=4, depth=1, n_classes=3, activation="gelu"), "cross_entropy"),
    "fused": (Fused, "cross_entropy"),
    "fused-mse": (Fused, "mse"),
    "encoder-post": (lambda: Encoder(False), "cross_entropy"),
    "encoder-pre": (lambda: Encoder(True), "cross_entropy"),
}


def case(name, seed=1):
    make, loss = CASES[name]
    return randomised(make(), seed), *samples(seed), loss


def reference_losses(model, x, y, loss):
    """(n,) by torch's own losses."""
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else out.logits
    if loss == "cross_entropy":
        return F.cross_entropy(out, y, reduction="none")
    return F.mse_loss(out, F.one_hot(y, out.shape[-1]).to(out), reduction="none").mean(1)


def reference(model, x, y, loss, names=None):
    """Value, gradient (P,) and Hessian (P, P) of the mean loss by double backward; only the parameters in `names`."""
    chosen = [p for n, p in model.named_parameters() if names is None or n in names]
    with sdpa_kernel(SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        value = reference_losses(model.eval(), x, y, loss).mean()
        torch.backends.mha.set_fastpath_enabled(True)
        g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(value, chosen, create_graph=True)])
        units = torch.eye(len(g), dtype=g.dtype)
        rows = torch.autograd.grad(g, chosen, units, is_grads_batched=True, materialize_grads=True)
    return value.detach(), g.detach(), torch.cat([t.reshape(len(g), -1) for t in rows], 1)


def sample_hessians(model, x, y, loss="cross_entropy"):
    return torch.stack([reference(model, x[i : i + 1], y[i : i + 1], loss)[2] for i in range(len(x))])


def norms_of(hessians):
    return torch.linalg.eigvalsh((hessians + hessians.mT) / 2).abs().amax(-1)


def close(a, b, tolerance=TIGHT):
    """Largest difference within `tolerance` of the largest entry of b."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_double_backward(name):
    model, x, y, loss = case(name)
    value, g, H = reference(model, x, y, loss)
    losses = Losses(model, x, y, loss, chunk_size=2)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(len(g), generator=generator, dtype=F64)

    close(losses.values(), reference_losses(model, x, y, loss).detach(), 1e-12)
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


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_torch(name):
    """The counter of torch itself, and twice as many for twice the samples."""
    model, x, y, loss = case(name)
    losses = Losses(model, x, y, loss)
    losses.sample_gradients()  # the size of the activations is found once
    _, ours = operations(losses.sample_gradients)
    with FlopCounterMode(display=False) as counter:
        losses.sample_gradients()
    assert ours == counter.get_total_flops() > 0
    double = Losses(model, torch.cat([x, x]), torch.cat([y, y]), loss)
    double.sample_gradients()
    _, twice = operations(double.sample_gradients)
    assert twice == 2 * ours


@pytest.mark.parametrize("name", [n for n in CASES if "relu" not in n])
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
            (losses.gradient(losses.w + (w - losses.w) + s * v) - losses.gradient(w - s * v)) / (2 * s)
            for s in (h, 2 * h)
        ]
        close(losses.product(v, w), (4 * d[0] - d[1]) / 3, 1e-7)
        slope = (losses.values(w + h * v).mean() - losses.values(w - h * v).mean()) / (2 * h)
        assert abs(slope - losses.gradient(w) @ v) <= 1e-6 * losses.gradient(w).norm()
        sample_slope = (losses.values(w + h * v) - losses.values(w - h * v)) / (2 * h)
        close(losses.sample_gradients(w) @ v, sample_slope, 1e-6)


def test_layer_norm_trap():
    """`torch.func.hessian` of a module with an affine `F.layer_norm` is wrong, silently; ours is not.

    Its reverse-over-reverse and forward-over-jacrev compositions lose terms; this is why `jvp(grad)` is used.
    """
    model, x, y, loss = case("fused")
    named = {n: p.detach() for n, p in model.named_parameters()}
    shapes = {n: t.shape for n, t in named.items()}
    flat = torch.cat([t.reshape(-1) for t in named.values()])

    def value(w):
        parts = w.split([s.numel() for s in shapes.values()])
        point = {n: t.reshape(s) for t, (n, s) in zip(parts, shapes.items(), strict=True)}
        return reference_losses(lambda x: functional_call(model, point, (x,)), x, y, loss).mean()

    _, _, H = reference(model, x, y, loss)
    with sdpa_kernel(SDPBackend.MATH):
        trap = torch.func.hessian(value)(flat)
    scale = H.abs().max()
    assert (trap - trap.T).abs().max() > 1e-3 * scale
    assert (trap - H).abs().max() > 1e-3 * scale
    close(dense_hessian(model, x, y, loss), H)


def test_parameter_patterns():
    model, x, y, loss = case("vit-pre-cls-gelu-depth2")
    names = [n for n, _ in model.named_parameters()]
    _, g, H = reference(model, x, y, loss)
    owner = torch.cat([torch.full((p.numel(),), i) for i, (_, p) in enumerate(model.named_parameters())])
    for patterns, chosen in (
        (["head.*"], ["head.weight", "head.bias"]),
        (["*.query.*", "pos"], [n for n in names if ".query." in n or n == "pos"]),
        (["head.*", "blocks.1.*"], [n for n in names if n.startswith(("head", "blocks.1."))]),  # order: the model's
    ):
        keep = torch.isin(owner, torch.tensor([names.index(n) for n in chosen]))
        options = dict(parameters=patterns)
        close(dense_hessian(model, x, y, loss, **options), H[keep][:, keep])
        close(per_sample_gradients(model, x, y, loss, **options).mean(0), g[keep])
        v = torch.randn(int(keep.sum()), generator=torch.Generator().manual_seed(0), dtype=F64)
        found = hessian_vector_product(model, x, y, v, loss, **options)
        close(found, H[keep][:, keep] @ v)
        assert not found.requires_grad  # no graph through the weights that stand still
        norm = norms_of(H[keep][:, keep])
        assert hessian_norm(model, x, y, loss, **options).value == pytest.approx(float(norm), rel=1e-6)
    refused(lambda: Losses(model, x, y, parameters=["Head.*"]), "Head", "head.weight")
    losses = Losses(model, x, y, parameters=["head.*"])
    whole = Losses(model, x, y)
    some = whole.moving(["head.*"])  # the same as made anew, and the whole stays whole
    assert torch.equal(some.gradient(), losses.gradient()) and some.P == losses.P < whole.P == len(whole.gradient())
    assert list(losses.unflatten(torch.zeros(7, losses.P, dtype=F64))) == ["head.weight", "head.bias"]
    assert losses.unflatten(torch.zeros(7, losses.P, dtype=F64))["head.weight"].shape == (7, 3, 4)


def test_functions_by_name_and_options():
    """The named functions are the class's methods; float32 and integer inputs are taken as they come."""
    model, x, y, loss = case("vit-post-cls-tanh")
    V = torch.ones(len(x), Losses(model, x, y).P, dtype=F64)
    H = sample_hessians(model, x[:2], y[:2], loss)
    close(per_sample_hessian_vector_product(model, x, y, V, loss)[:2], H.sum(2))
    close(per_sample_losses(model, x, y, loss), reference_losses(model, x, y, loss).detach())
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


# --- norms --------------------------------------------------------------------------------------------


class TwoLinear(nn.Module):
    """W_2 W_1 x with small weights: the Hessian is nearly [[0, C], [C^T, 0]], whose spectrum is symmetric about 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(x.flatten(1)))


class Hidden(nn.Module):
    """A logit with a gradient along two weights and curvature along others: the gradient never sees the norm."""

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = nn.Parameter(torch.tensor([0.3, 0.2])), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        f = x.flatten(1)[:, :2] @ self.seen + 0.1 * self.seen[1] ** 2
        f = (f + (self.unseen**2 * torch.arange(1.0, 7).to(x)).sum() * 5)[:, None]
        return torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], 1)


class Late(nn.Module):
    """Ends of the spectrum near -1 and 0.98, and a gradient with a share of 1e-4 in the larger one: it comes late."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(40))
        self.register_buffer("bend", torch.cat([torch.linspace(-0.3, 0.3, 38), torch.tensor([0.98, -1.0])]))
        self.register_buffer("slope", torch.tensor([1e-3] * 39 + [1e-7]))

    def forward(self, x):
        f = 2 + 0.1 * x.flatten(1).mean(1, keepdim=True) + self.slope @ self.w + self.bend @ self.w**2 / 2
        return torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], 1)


def scaled(make, scale):
    return lambda: randomised(make(), 7, scale)


NORM_CASES = {
    "vit": lambda: randomised(vit(), 5),
    "vit-small-weights": lambda: randomised(vit(norm="post"), 6, 0.2),
    "vit-large-weights": lambda: randomised(vit(pool="mean"), 8, 1.5),
    "fused": lambda: randomised(Fused(), 5),
    "near-degenerate-1e-1": scaled(TwoLinear, 1e-1),
    "near-degenerate-1e-2": scaled(TwoLinear, 1e-2),
    "near-degenerate-1e-4": scaled(TwoLinear, 1e-4),
    "hidden": lambda: Hidden().double(),
    "late": lambda: Late().double(),
}


@pytest.mark.parametrize("name", NORM_CASES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_per_sample_norms_are_those_of_dense_hessians(name, loss):
    model, (x, y) = NORM_CASES[name](), samples(11, n=8)
    hessians = sample_hessians(model, x, y, loss)
    exact = norms_of(hessians)
    found = per_sample_hessian_norms(model, x, y, loss, chunk_size=5)
    for column in (found.value, found.lower, found.upper, found.residual, found.iterations, found.converged):
        assert isinstance(column, torch.Tensor) and column.shape == (8,)
    assert found.value.dtype == F64 and found.converged.dtype == torch.bool and not found.iterations.is_floating_point()
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
    """The cases above are what they are named for: indefinite, +/- degenerate, unseen by the gradient."""
    x, y = samples(11, n=8)
    ends = torch.linalg.eigvalsh(sample_hessians(NORM_CASES["near-degenerate-1e-4"](), x, y))[:, [0, -1]]
    assert ((ends[:, 0] + ends[:, 1]).abs() <= 1e-3 * ends[:, 1]).all()
    ends = torch.linalg.eigvalsh(sample_hessians(NORM_CASES["vit-small-weights"](), x, y))[:, [0, -1]]
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
    x, y = samples(n=3)
    for certify in (False, True):
        found = per_sample_hessian_norms(model, 0 * x, y, certify=certify)
        assert found.value.tolist() == [0.0] * 3 and found.residual.tolist() == [0.0] * 3
        assert found.converged.all()


def test_the_failure_is_divided_over_the_samples(monkeypatch):
    asked, original = set(), curvature.lanczos_epsilon
    monkeypatch.setattr(
        curvature, "lanczos_epsilon", lambda steps, P, failure: asked.add(failure) or original(steps, P, failure)
    )
    model, (x, y) = randomised(Fused(), 5), samples(n=4)
    per_sample_hessian_norms(model, x, y, certify=True, confidence=0.9, chunk_size=3, max_steps=5)
    assert [*asked] == [pytest.approx(0.1 / 4)]
    asked.clear()
    hessian_norm(model, x, y, certify=True, confidence=0.9, max_steps=5)
    assert [*asked] == [pytest.approx(0.1)]


def test_few_steps_certify_nothing():
    model, (x, y) = randomised(vit(), 5), samples(n=3)
    found = per_sample_hessian_norms(model, x, y, certify=True, max_steps=3)
    assert found.upper.isinf().all() and not found.converged.any()
    assert (found.value <= norms_of(sample_hessians(model, x, y)) * (1 + 1e-10)).all()
    assert hessian_norm(model, x, y, certify=True, max_steps=3).upper == math.inf


@pytest.mark.parametrize(
    "P, table", [(1_000, {40: 6.17, 60: 2.87, 100: 1.08}), (1_000_000, {40: 8.27, 60: 3.86, 100: 1.45})]
)
def test_lanczos_epsilon(P, table):
    """The table of Theorem (thm:lanczos) in percent, the equation itself, and what few steps say."""
    for steps, percent in table.items():
        eps = lanczos_epsilon(steps, P, 1e-6)
        assert round(100 * eps, 2) == percent
        left = math.sqrt((1 - eps) / eps) / math.cosh(2 * (steps - 1) * math.atanh(math.sqrt(eps)))
        assert left == pytest.approx(0.5e-6 / math.sqrt(2 * P / math.pi), rel=1e-9)
    eps = [lanczos_epsilon(q, P, 1e-6) for q in range(1, 200)]
    assert eps[:3] == [0.5] * 3 and min(eps) > 0
    assert all(a >= b for a, b in itertools.pairwise(eps))
    assert lanczos_epsilon(50, P, 1e-6) > lanczos_epsilon(50, P, 1e-2)


def diagonal(values):
    values = torch.as_tensor(values, dtype=F64)
    return lambda v, rows, out: v * values


def never(ritz, steps):
    return torch.zeros_like(ritz.value, dtype=torch.bool)


def test_a_chosen_start_certifies_nothing():
    """A start orthogonal to the top eigenvector converges, and the formula's upper end lies below the norm."""
    values = torch.cat([torch.linspace(-0.4, 0.5, 99, dtype=F64), torch.tensor([1.0], dtype=F64)])
    blind, fair = torch.ones(1, 100, dtype=F64), curvature.uniform_start((1, 100), SimpleNamespace(w=values), 0)
    blind[0, -1] = 0.0
    found = {}
    for name, start in (("blind", blind), ("fair", fair)):
        ritz = lanczos(diagonal(values), start, max_steps=40, done=never)
        found[name] = ritz.value.item(), curvature._certified(ritz, 100, 1e-3).item()
        assert ritz.residual.item() < 1e-3 * ritz.value.item() and not ritz.exhausted.any()
    assert found["blind"][0] < 0.51 and found["blind"][1] < 0.6  # the norm is 1: nothing was certified
    assert found["fair"][0] <= 1 + 1e-12 and 1 <= found["fair"][1] < 1.1
    # the same on a network: the gradient is blind, and only the random start of `certify` is allowed an upper end
    model, (x, y) = Hidden().double(), samples(n=3)
    exact = norms_of(sample_hessians(model, x, y))
    losses = Losses(model, x, y)
    ritz = lanczos(
        lambda v, rows, out: losses.sample_products(v, rows), losses.sample_gradients(), max_steps=40, done=never
    )
    assert (ritz.value < 0.1 * exact).all() and (ritz.residual <= 1e-10 * exact).all()
    certified = per_sample_hessian_norms(model, x, y, certify=True)
    assert (certified.lower <= exact * (1 + 1e-12)).all() and (exact <= certified.upper * (1 + 1e-12)).all()


@pytest.mark.parametrize("failure", [0.3, 0.05])
def test_certificate_holds_as_often_as_it_says(failure):
    """A hard spectrum (one eigenvalue just above a bulk of Chebyshev nodes), 2000 starts, few steps."""
    P, steps = 40, 8
    eps = lanczos_epsilon(steps, P, failure)
    assert eps < 0.5
    nodes = (1 + torch.cos(math.pi * (torch.arange(P - 1, dtype=F64) + 0.5) / (P - 1))) / 2
    for gap in (eps, eps / 2, 0.9):
        values = torch.cat([(1 - gap) * nodes, torch.tensor([1.0], dtype=F64)]) - 0.3
        start = torch.randn(2000, P, dtype=F64, generator=torch.Generator().manual_seed(9))
        ritz = lanczos(diagonal(values), start, max_steps=steps, done=never)
        upper = curvature._certified(ritz, P, failure)
        assert (ritz.value <= 0.7 * (1 + 1e-12)).all()
        assert (upper < 0.7).double().mean() <= failure
        assert upper.isfinite().all()


def test_lanczos_on_a_known_spectrum():
    """Ritz values, residuals and the end of a Krylov space, with finished rows leaving the batch."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 12, 12, generator=generator, dtype=F64)
    A = A + A.mT
    A[1] = torch.diag(torch.tensor([2.0, -5.0, *[0.0] * 10], dtype=F64))  # three distinct eigenvalues: three steps
    start = torch.randn(3, 12, generator=generator, dtype=F64)
    seen = []

    def product(v, rows, out):
        seen.append(len(rows))
        return torch.einsum("mij,mj->mi", A[rows], v)

    ritz = lanczos(product, start, max_steps=99, done=never)
    assert ritz.steps.tolist() == [12, 3, 12] and bool(ritz.exhausted[1])
    assert seen == [3] * 3 + [2] * 9
    spectrum = torch.linalg.eigvalsh(A)
    torch.testing.assert_close(ritz.low, spectrum[:, 0])
    torch.testing.assert_close(ritz.high, spectrum[:, -1])
    assert (ritz.residual <= 1e-10).all()
    # after 5 steps: the residual is that of the Ritz vector, computed here from the Krylov basis
    ritz = lanczos(product, start, max_steps=5, done=never)
    for i in (0, 2):
        Q = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(A[i], j) @ start[i] for j in range(5)], 1)).Q
        theta, s = torch.linalg.eigh(Q.T @ A[i] @ Q)
        top = int(theta.abs().argmax())
        v = Q @ s[:, top]
        assert ritz.value[i].item() == pytest.approx(theta[top].abs().item(), rel=1e-9)
        assert ritz.residual[i].item() == pytest.approx((A[i] @ v - theta[top] * v).norm().item(), rel=1e-7)


@pytest.mark.parametrize("name", ["vit-pre-cls-gelu-depth2", "vit-post-mean-gelu-depth2-mse", "fused", "encoder-pre"])
def test_estimators_of_the_norm_agree(name):
    model, x, y, loss = case(name)
    H = reference(model, x, y, loss)[2]
    norm = float(norms_of(H))
    exact = hessian_norm(model, x, y, loss, estimator="exact")
    assert exact.value == pytest.approx(norm, rel=1e-10)
    assert exact.residual <= 1e-9 * norm and exact.lower <= exact.value <= exact.upper
    for tolerance in (1e-2, 1e-6):
        found = hessian_norm(model, x, y, loss, tolerance=tolerance)
        assert found.value <= norm * (1 + 1e-12) and found.converged and found.residual <= tolerance * found.value
        assert math.isnan(found.upper)
    assert found.value == pytest.approx(norm, rel=1e-8)
    certified = hessian_norm(model, x, y, loss, certify=True)
    assert certified.lower <= norm * (1 + 1e-12) and norm <= certified.upper <= 1.05 * norm * (1 + 1e-12)
    power = hessian_norm(model, x, y, loss, estimator="pyhessian")
    assert power.value == pytest.approx(norm, rel=0.02) and power.lower <= norm * (1 + 1e-12)
    for estimate in (exact, found, certified, power):
        for field in (estimate.value, estimate.lower, estimate.upper, estimate.residual):
            assert isinstance(field, float)
        assert isinstance(estimate.iterations, int) and isinstance(estimate.converged, bool)
    refused(lambda: hessian_norm(model, x, y, loss, estimator="power"), "power", "lanczos")


def test_pyhessian_is_taken_through_its_adapter():
    """Value, residual and convergence are ours, by the dense matrix; a subset of the parameters works, too."""
    model, x, y, loss = case("vit-pre-cls-gelu-depth2")
    for names in (None, ["head.weight", "head.bias"]):
        H = reference(model, x, y, loss, names)[2]
        norm = float(norms_of(H))
        found = hessian_norm(model, x, y, loss, estimator="pyhessian", parameters=names)
        assert found.value == pytest.approx(norm, rel=1e-4) and found.lower <= norm * (1 + 1e-12)
        nearest = (torch.linalg.eigvalsh((H + H.T) / 2).abs() - found.value).abs().min()
        assert nearest <= found.residual + 1e-10 * norm and found.converged == (found.residual <= 1e-4 * found.value)
    value, error = hessian_trace(model, x, y, loss, estimator="pyhessian", probes=40)
    assert abs(value - reference(model, x, y, loss)[2].trace()) <= 4 * error
    refused(lambda: hessian_norm(model, x, y, loss, estimator="pyhessian", part="functional"), "functional")


@pytest.mark.parametrize("ordered", [False, True])
def test_difference_norms_are_those_of_dense_differences(ordered):
    model, x, y, loss = case("vit-post-cls-tanh")
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
        model, x, y, [1, 2], order if ordered else None, loss, arriving=order[4], tolerance=1e-6, max_steps=300
    )
    for k, step, limit, first in zip(again.sizes, again.step, again.limit, found.limit):
        exact = norms_of(hessians[order[4]] - H[k - 1]) / (k + 1)
        assert step.value == pytest.approx(float(exact), rel=1e-8) and limit.value == first.value
    for sizes in ([0], [5], [2, 7]):
        refused(lambda s=sizes: hessian_difference_norms(model, x, y, s, loss=loss), "sizes")


def test_trace():
    """Within four standard errors, unbiased over seeds, and the standard error is the spread over seeds."""
    model, x, y, loss = case("mlp")
    exact = reference(model, x, y, loss)[2].trace().item()
    value, error = hessian_trace(model, x, y, loss, probes=64)
    assert 0 < error and abs(value - exact) <= 4 * error
    runs = torch.tensor([hessian_trace(model, x, y, loss, probes=8, seed=s) for s in range(40)], dtype=F64)
    spread = runs[:, 0].std().item()
    assert abs(runs[:, 0].mean().item() - exact) <= 4 * spread / math.sqrt(40)
    assert 0.7 <= runs[:, 1].square().mean().sqrt().item() / spread <= 1.4
    # of a diagonal Hessian every Rademacher probe gives the trace itself
    hidden = Hidden().double()
    value, error = hessian_trace(hidden, x, y, probes=3, parameters=["unseen"])
    diagonal_hessian = reference(hidden, x, y, "cross_entropy", names=["unseen"])[2]
    assert value == pytest.approx(diagonal_hessian.trace().item(), rel=1e-10)
    assert error <= 1e-10 * abs(value)


def test_hutch_plus_plus_beats_hutchinson_where_few_eigenvalues_rule():
    """Unbiased over seeds, its standard error is its spread, and it is smaller at the same number of products."""
    model, x, y, loss = case("vit-pre-cls-gelu-depth2")
    exact = reference(model, x, y, loss)[2].trace().item()
    spread = {}
    for estimator in ("hutchinson", "hutch++"):
        found = torch.tensor(
            [hessian_trace(model, x, y, loss, estimator=estimator, probes=24, seed=s) for s in range(40)], dtype=F64
        )
        spread[estimator] = found[:, 0].std().item()
        assert abs(found[:, 0].mean().item() - exact) <= 4 * spread[estimator] / math.sqrt(40)
        assert 0.6 <= found[:, 1].square().mean().sqrt().item() / spread[estimator] <= 1.6
    assert spread["hutch++"] < 0.5 * spread["hutchinson"]
    for estimator, probes in (("hutchinson", 1), ("hutch++", 5), ("pyhessian", 1)):
        refused(lambda e=estimator, n=probes: hessian_trace(model, x, y, loss, estimator=e, probes=n), "probes")
    refused(lambda: hessian_trace(model, x, y, loss, estimator="xtrace"), "hutchinson")


def test_spectral_density_counts_the_eigenvalues():
    """All P steps from each start: the weights are those of the dense spectrum; fewer keep the moments."""
    model, x, y, loss = case("mlp")
    H = reference(model, x, y, loss)[2]
    values, P = torch.linalg.eigvalsh(H).numpy(), len(H)
    full = spectral_density(model, x, y, loss, probes=60, steps=P)
    assert full.nodes.shape == full.weights.shape == (60, P) and full.P == P
    np.testing.assert_allclose(full.weights.sum(1), 1, rtol=1e-12)
    thresholds = [0.3 * values.max(), 0.05 * values.max(), 1e-3 * values.max()]
    for sign in (1, -1):
        mean, low, high = full.count(thresholds, sign)
        exact = [(sign * values > t).sum() for t in thresholds]
        slack = (high - low) * 0.75 + 1e-9  # 60 probes: three standard errors
        assert (np.abs(mean - exact) <= slack).all(), (sign, mean, exact, slack)
    few = spectral_density(model, x, y, loss, probes=60, steps=4)
    for power in (1, 2, 3):
        value, error = few.moment(power)
        assert abs(value - (values**power).sum()) <= 4 * error
        again = full.moment(power)  # the same starts: moments below 2 steps do not depend on the steps
        assert value == pytest.approx(again[0], rel=1e-8)
    flat = spectral_density(nn.Linear(16, 3).double(), 0 * x.flatten(1), y, probes=2, steps=9, parameters=["weight"])
    assert not flat.nodes.any() and flat.count([0.5])[0] == 0
    refused(lambda: spectral_density(model, x, y, loss, probes=1), "probes")


def test_block_norms_are_those_of_the_dense_blocks():
    model, x, y, loss = case("vit-pre-cls-gelu-depth2")
    H = reference(model, x, y, loss)[2]
    groups = curvature.parameter_groups(model)
    assert list(groups)[:2] == ["embedding", "LN 1"] and list(groups)[-1] == "head" and len(groups) == 16
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    found = hessian_block_norms(model, x, y, loss, tolerance=1e-4, max_steps=60)
    assert found.groups == list(groups) and found.values.shape == found.residual.shape == (16, 16)
    owner = torch.cat([torch.full((p.numel(),), i) for _, p in model.named_parameters()
                       for i, names in enumerate(groups.values()) if _ in names])  # fmt: skip
    for i, j in itertools.product(range(16), repeat=2):
        exact = torch.linalg.matrix_norm(H[owner == i][:, owner == j], 2).item()
        assert found.values[i, j] == pytest.approx(exact, rel=1e-6), (i, j)
        assert found.residual[i, j] <= 1e-3 * exact
    # any other module: one group for each submodule that owns parameters
    assert list(curvature.parameter_groups(Fused())) == ["scale", "shift", "embed", "qkv", "head"]


@pytest.mark.parametrize("name", ["vit-pre-cls-gelu-depth2", "vit-post-mean-gelu-depth2-mse", "mlp"])
def test_both_engines_give_the_same(name):
    """The calculus, and jvp(grad) on the same network made unknown to it by a hook that does nothing."""
    model, x, y, loss = case(name)
    twin = copy.deepcopy(model)
    twin.register_forward_hook(lambda *_: None)
    known, unknown = Losses(model, x, y, loss), Losses(twin, x, y, loss)
    assert known.steps is not None and unknown.steps is None
    V = torch.randn(len(x), known.P, dtype=F64, generator=torch.Generator().manual_seed(2))
    for part in ("full", "gauss_newton", "functional"):
        close(known.product(V[0], part=part), unknown.product(V[0], part=part), 1e-9)
        close(known.sample_products(V, part=part), unknown.sample_products(V, part=part), 1e-9)
        a, b = (per_sample_hessian_norms(m, x, y, loss, part=part).value for m in (model, twin))
        close(a, b, 1e-6)
    close(known.sample_gradients(), unknown.sample_gradients())


def test_a_changed_network_is_not_taken_for_ours():
    """A replaced layer, a patched forward, a parametrisation: the calculus steps aside and the answer stays right."""
    x, y = samples()

    class Doubled(nn.Linear):
        def forward(self, z):
            return 2 * super().forward(z)

    def replaced(model):
        model.blocks[0].mlp.fc1 = randomised(Doubled(4, 4), 3)

    def patched(model):
        model.norm.forward = MethodType(lambda self, z: z * self.weight + self.bias, model.norm)

    def parametrised(model):
        torch.nn.utils.parametrize.register_parametrization(model.head, "weight", Call(lambda t: 2 * t))

    for change in (replaced, patched, parametrised):
        model = randomised(vit(), 2)
        assert Losses(model, x, y).steps is not None
        change(model)
        assert Losses(model, x, y).steps is None
        close(dense_hessian(model, x, y), reference(model, x, y, "cross_entropy")[2])


def test_chunks_follow_the_memory_budget():
    model, x, y, loss = case("vit-pre-cls-gelu-depth2")
    values = []
    for memory in (2**30, 2**20, 1):
        losses = Losses(model, x, y, loss, memory=memory)
        values.append(losses.chunk(24))
        each = 8 * 24 * losses.P
        assert losses.chunk(24) == 1 or losses.chunk(24) * each <= memory
        close(losses.product(losses.w), Losses(model, x, y, loss).product(losses.w), 1e-12)
        close(losses.sample_gradients(), Losses(model, x, y, loss).sample_gradients(), 1e-12)
    assert values[0] > values[1] > values[2] == 1
    assert Losses(model, x, y, loss, chunk_size=7, memory=1).chunk(24) == 7


def test_only_on_a_cpu_has_a_chunk_a_size_of_its_own(monkeypatch):
    """Elsewhere all samples go together, as far as the budget goes; a tensor without storage stands for a GPU's."""
    model, x, y, loss = case("vit-pre-cls-gelu-depth2")
    x, y = torch.cat([x] * 100), torch.cat([y] * 100)
    roomy, tight = (Losses(model, x, y, loss, memory=memory) for memory in (2**40, 2**22))
    assert roomy.chunk(3) == 64 and roomy.chunk(0, 128) == 128
    scarce = tight.chunk(24)
    monkeypatch.setattr(Losses, "w", roomy.w.to("meta"))
    assert roomy.chunk(3) == roomy.chunk(0, 128) == len(x) > 128
    assert tight.chunk(24) == scarce < 64


def test_half_trained_network():
    """Indefinite Hessians after a few steps of training: every value within 1e-3 of the dense one, both precisions."""
    model, (x, y) = vit(depth=2, d_model=8, d_ff=8), samples(7, n=20)
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
        assert ((error <= tolerance) | ~found.converged).all() and found.converged.double().mean() >= 0.95


def test_operator_norm_reports_what_it_did():
    values = torch.linspace(-3, 2, 50, dtype=F64)
    start = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = operator_norm(lambda v: values * v, start, tolerance=1e-5, max_steps=50)
    assert found.value == pytest.approx(3.0, rel=1e-9) and found.residual <= 1e-5 * found.value and found.converged
    short = operator_norm(lambda v: values * v, start, tolerance=1e-5, max_steps=4)
    assert short.iterations == 4 and not short.converged and short.value < 3.0
    assert operator_norm(lambda v: 0 * v, start, tolerance=1e-5, max_steps=50).value == 0.0


# --- what is left behind, and what is refused -----------------------------------------------------------


def test_model_and_generators_are_left_alone():
    model, x, y, loss = case("fused")
    model = model.float().train()
    model.head.weight.requires_grad_(False)
    model.shift.grad = torch.full_like(model.shift, 3.0)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    inputs, v = x.clone(), torch.ones(Losses(model, x, y).P, dtype=F64)
    for call in (
        lambda: per_sample_losses(model, x, y, loss),
        lambda: per_sample_gradients(model, x, y, loss),
        lambda: hessian_vector_product(model, x, y, v, loss),
        lambda: per_sample_hessian_vector_product(model, x, y, v.expand(5, -1), loss),
        lambda: per_sample_hessian_norms(model, x, y, loss, max_steps=9),
        lambda: per_sample_hessian_norms(model, x, y, loss, certify=True, max_steps=9),
        lambda: hessian_norm(model, x, y, loss, max_steps=9),
        lambda: hessian_norm(model, x, y, loss, estimator="pyhessian"),
        lambda: hessian_difference_norms(model, x, y, [2], loss=loss, max_steps=9),
        lambda: hessian_trace(model, x, y, loss, probes=2),
        lambda: hessian_trace(model, x, y, loss, estimator="hutch++", probes=6),
        lambda: spectral_density(model, x, y, loss, probes=2, steps=3),
        lambda: hessian_block_norms(model, x, y, loss, max_steps=2),
    ):
        first, again = call(), call()
        assert repr(first) == repr(again)  # the same seed, the same answer
        assert model.training and all(m.training for m in model.modules())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["shift"]
        assert bool((model.shift.grad == 3).all()) and torch.equal(x, inputs)
        assert all(torch.equal(t, before[n]) and t.dtype == torch.float32 for n, t in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == default
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_frozen_parameters_are_coordinates_like_any_other():
    """The surface is a function of all weights; `parameters` restricts it, requires_grad does not."""
    model, x, y, loss = case("mlp")
    frozen = copy.deepcopy(model)
    frozen.layers[0].requires_grad_(False)
    close(dense_hessian(frozen, x, y, loss), dense_hessian(model, x, y, loss))
    found, expected = (per_sample_hessian_norms(m, x, y, loss).value for m in (frozen, model))
    assert torch.equal(found, expected)


def test_parameters_that_the_loss_does_not_use():
    """Zero rows and columns, in both engines: the norm is that of the rest."""
    model, x, y, loss = case("fused")
    norm = per_sample_hessian_norms(model, x, y, loss).value
    model.idle = nn.Linear(3, 3).double()
    close(per_sample_hessian_norms(model, x, y, loss).value, norm, 1e-9)
    H = dense_hessian(model, x, y, loss)
    assert not H[-12:].any() and not H[:, -12:].any()
    # the key bias of our own attention has no influence: softmax ignores constants in its rows
    own, x, y, loss = case("vit-pre-mean-relu")
    only = per_sample_hessian_norms(own, x, y, loss, parameters=["*.key.bias"])
    assert (only.value <= 1e-12 * per_sample_hessian_norms(own, x, y, loss).value).all()
    assert per_sample_hessian_norms(model, x, y, parameters=["idle.*"]).value.tolist() == [0.0] * 5


def test_one_class_has_no_curvature():
    x, y = samples(K=1)
    for model in (randomised(vit(n_classes=1), 1), randomised(Fused(K=1), 1)):
        for certify in (False, True):
            found = per_sample_hessian_norms(model, x, y, certify=certify)
            assert found.value.abs().max() <= 1e-12 and found.converged.all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [vit, Fused])
def test_weights_that_are_no_numbers_are_refused(make, value):
    model, (x, y) = make().double(), samples()
    with torch.no_grad():
        model.head.weight[0, 0] = value
    for call in (
        lambda: per_sample_losses(model, x, y),
        lambda: per_sample_hessian_norms(model, x, y),
        lambda: hessian_norm(model, x, y),
        lambda: spectral_density(model, x, y),
        lambda: hessian_block_norms(model, x, y),
    ):
        refused(call, "head.weight", "NaN or infinity")


def test_starts_come_from_a_stream_of_their_own():
    """Weights drawn with any seed are not the vector that the same seed gives a certificate."""
    losses = SimpleNamespace(w=torch.zeros(1, dtype=F64))
    for seed in (0, 1, 7):
        start = curvature.uniform_start((64,), losses, seed)
        drawn = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=F64)
        assert abs(torch.corrcoef(torch.stack([start, drawn]))[0, 1]) < 0.5
        assert torch.equal(start, curvature.uniform_start((64,), losses, seed))
    assert not torch.equal(curvature.uniform_start((64,), losses, 0), curvature.uniform_start((64,), losses, 1))


class Wrapped(nn.Module):
    """A linear classifier with something done to its input."""

    def __init__(self, before, after=None):
        super().__init__()
        self.before, self.head, self.after = before, nn.Linear(16, 3), after or nn.Identity()

    def forward(self, x):
        return self.after(self.head(self.before(x.flatten(1))))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "before, after, words",
    [
        (nn.Dropout(0.1), None, ("before", "dropout", "0.1")),
        (nn.BatchNorm1d(16), None, ("before", "batch statistics")),
        (Call(lambda x: x + 0.1 * torch.randn_like(x)), None, ("two outputs",)),
        (Call(lambda x: F.dropout(x, 0.5, training=True)), None, ("two outputs",)),
        (Call(lambda x: x - x.mean(0)), None, ("rest of the batch",)),
        (Call(lambda x: x * len(x)), None, ("rest of the batch",)),
        (nn.Identity(), Call(lambda f: f / 0), ("finite",)),
        (nn.Identity(), Call(lambda f: f[:, 0]), ("shape", "logits")),
        (nn.Identity(), Call(lambda f: f[:, None]), ("shape", "logits")),
    ],
)
def test_random_and_batch_dependent_models_are_refused(before, after, words):
    model, (x, y) = Wrapped(before, after).double(), samples()
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=F64)
    for call in (
        lambda: per_sample_losses(model, x, y),
        lambda: hessian_vector_product(model, x, y, v),
        lambda: per_sample_hessian_norms(model, x, y),
        lambda: hessian_norm(model, x, y, estimator="pyhessian"),
    ):
        refused(call, *words)


def test_arguments_that_make_no_sense():
    model, (x, y) = Wrapped(nn.Dropout(0.0)).double(), samples()
    assert per_sample_losses(model, x, y).shape == (5,)  # dropout that drops nothing is fine
    refused(lambda: per_sample_losses(model, x, y[:3]), "5", "3")
    refused(lambda: per_sample_losses(model, x[:0], y[:0]), "0")
    refused(lambda: per_sample_losses(model, x, y, "hinge"), "hinge")
    assert per_sample_losses(model, x[:1], y[:1]).shape == (1,)
    assert per_sample_hessian_norms(model, x[:1], y[:1]).value.shape == (1,)
    for confidence in (-9.0, 1.0, 1.5):
        refused(lambda c=confidence: per_sample_hessian_norms(model, x, y, certify=True, confidence=c), "confidence")
        refused(lambda c=confidence: hessian_norm(model, x, y, certify=True, confidence=c), "confidence")
