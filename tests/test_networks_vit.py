"""The networks against torch's own functional operations; tracing; second derivatives."""

import copy
import math
from functools import partial

import pytest
import torch
from networks import VIT, flat, images, labels, randomised, tiny_mlp, tiny_vit
from refusal import refused
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev
from torch.nn import functional as F

from utils.networks import build_model
from utils.networks.losses import loss_from_logits

SIZES = dict(channels=2, depth=2, d_model=6, d_ff=5)


def reference_forward(model, x):
    """The same function of the same weights, by torch's convolution and multi-head attention."""
    c = model.config
    w = model.state_dict()
    kernel = w["embed.weight"].reshape(c.d_model, c.channels, c.patch_size, c.patch_size)
    h = F.conv2d(x, kernel, w["embed.bias"], stride=c.patch_size).flatten(2).transpose(1, 2)
    if c.pool == "cls":
        h = torch.cat([w["cls"].repeat(len(x), 1)[:, None], h], 1)
    h = h + w["pos"]
    act = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}[
        c.activation
    ]

    def norm(z, name):
        return F.layer_norm(z, (c.d_model,), w[f"{name}.weight"], w[f"{name}.bias"], c.eps)

    def attention(z, name):
        z = z.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            z,
            z,
            z,
            c.d_model,
            c.n_heads,
            torch.cat([w[f"{name}.{part}.weight"] for part in ("query", "key", "value")]),
            torch.cat([w[f"{name}.{part}.bias"] for part in ("query", "key", "value")]),
            None,
            None,
            False,
            0.0,
            w[f"{name}.out.weight"],
            w[f"{name}.out.bias"],
            training=False,
        )
        return out.transpose(0, 1)

    def mlp(z, name):
        z = act(F.linear(z, w[f"{name}.fc1.weight"], w[f"{name}.fc1.bias"]))
        return F.linear(z, w[f"{name}.fc2.weight"], w[f"{name}.fc2.bias"])

    for i in range(c.depth):
        b = f"blocks.{i}"
        if c.norm == "pre":
            h = h + attention(norm(h, f"{b}.norm1"), f"{b}.attention")
            h = h + mlp(norm(h, f"{b}.norm2"), f"{b}.mlp")
        else:
            h = norm(h + attention(h, f"{b}.attention"), f"{b}.norm1")
            h = norm(h + mlp(h, f"{b}.mlp"), f"{b}.norm2")
    v = h[:, 0] if c.pool == "cls" else h.mean(1)
    if c.norm == "pre":
        v = norm(v, "norm")
    return F.linear(v, w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("eps, n_heads", [(1e-5, 3), (0.3, 1)])
def test_vit_is_the_reference(norm, pool, activation, eps, n_heads):
    kind = dict(norm=norm, pool=pool, activation=activation)
    model = randomised(tiny_vit(**SIZES, **kind, eps=eps, n_heads=n_heads))
    x = images(3, channels=2, seed=1)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (3, 3)
        torch.testing.assert_close(out, reference_forward(model, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("side, patch, channels", [(4, 4, 1), (6, 2, 3), (5, 1, 1)])
def test_vit_shapes_and_names(norm, pool, depth, side, patch, channels):
    sizes = dict(image_size=side, patch_size=patch, channels=channels, depth=depth)
    model = tiny_vit(**sizes, d_model=6, d_ff=5, norm=norm, pool=pool)
    assert model(images(2, channels, side)).shape == (2, 3)
    d = 6
    tokens = (side // patch) ** 2 + (pool == "cls")
    assert model.pos.shape == (tokens, d)
    attention = 4 * (d * d + d)
    perceptron = 2 * d * 5 + 5 + d
    expected = (channels * patch**2 + 1) * d + (pool == "cls") * d + tokens * d
    expected += depth * (attention + perceptron + 4 * d) + (norm == "pre") * 2 * d + 3 * (d + 1)
    assert len(flat(model)) == expected
    assert hasattr(model, "norm") == (norm == "pre")
    assert hasattr(model, "cls") == (pool == "cls")


def test_patches_are_read_row_by_row():
    model = tiny_vit(**SIZES)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    patches = model.patches(x)
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # upper right, channel by channel
    torch.testing.assert_close(patches, F.unfold(x, 2, stride=2).transpose(1, 2))


@pytest.mark.parametrize("depth, bias", [(0, False), (1, True), (3, False)])
def test_mlp_layout(depth, bias):
    """d_in -> width, then `depth` layers width -> width, then the classes."""
    model = tiny_mlp(d_in=8, width=5, depth=depth, bias=bias)
    shapes = [tuple(layer.weight.shape) for layer in model.layers]
    assert shapes == [(5, 8), *[(5, 5)] * depth, (3, 5)]
    assert all((layer.bias is not None) == bias for layer in model.layers)
    x = images(2, channels=2, side=2)
    h = x.reshape(2, 8)
    for layer in model.layers[:-1]:
        h = F.gelu(h @ layer.weight.T + (layer.bias if bias else 0))
    out = h @ model.layers[-1].weight.T + (model.layers[-1].bias if bias else 0)
    torch.testing.assert_close(model(x), out)


VIT_ERRORS = [
    dict(patch_size=3),
    dict(n_heads=3),
    dict(n_heads=0),
    dict(patch_size=0),
    dict(depth=-1),
    dict(d_ff=0),
    dict(norm="middle"),
    dict(activation="tanh"),
    dict(pool="max"),
]
MLP_ERRORS = [dict(activation="tanh"), dict(width=0)]


def test_sizes_that_do_not_fit():
    for build, errors in ((tiny_vit, VIT_ERRORS), (tiny_mlp, MLP_ERRORS)):
        for wrong in errors:
            refused(lambda build=build, wrong=wrong: build(**wrong), *wrong)
    for kind, sizes in (
        ("cnn", {}),
        ("vit", {"depth": 1}),
        ("mlp", {"heads": 2}),
        ("vit", VIT | {"width": 3}),
    ):
        refused(lambda kind=kind, sizes=sizes: build_model(kind, **sizes), kind)


def test_layer_norm_constant_row():
    """A constant row has variance 0: eps alone stands under the root, and nothing is nan."""
    layer = tiny_vit(eps=1e-5).norm
    with torch.no_grad():
        layer.bias.fill_(2.0)
    assert layer(torch.full((1, 4), 3.0, dtype=torch.float64)).tolist() == [[2.0] * 4]
    step = torch.tensor([[1e-3, -1e-3, 0, 0]], dtype=torch.float64)
    rho = math.sqrt(2e-6 / 4 + 1e-5)
    torch.testing.assert_close(layer(3 + step) - 2, step / rho)


def test_a_seed_gives_the_initial_weights_it_always_gave():
    """The order of the draws is part of every result that begins at an initial weight."""
    model = tiny_vit(0)
    first = {"cls": -0.2983176708, "pos": 0.0832276717, "head.weight": -0.1427189261}
    first |= {"blocks.0.attention.query.weight": 0.1104988158}
    first |= {"blocks.0.mlp.fc2.weight": -0.5338438749}
    for name, value in first.items():
        assert model.get_parameter(name).flatten()[0].item() == pytest.approx(value, abs=1e-9)
    assert torch.equal(flat(model), flat(tiny_vit(0)))


class WrittenOut(nn.Module):
    """LayerNorm in primitive operations, every derivative of which is right."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.eps = norm.eps

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return self.weight * (centred / scale) + self.bias


@pytest.mark.parametrize("norm, pool", [("pre", "cls"), ("post", "mean")])
def test_second_derivatives_through_layer_norm(norm, pool):
    """The dense Hessian in all weights by three ways that are right through `F.layer_norm`."""
    model = randomised(tiny_vit(norm=norm, pool=pool))
    x = images(3)
    y = labels(3)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    counts = [shape.numel() for shape in shapes.values()]
    w = flat(model)

    def loss(w, network=model):
        parts = zip(shapes.items(), w.split(counts))
        point = {name: part.view(shape) for (name, shape), part in parts}
        return loss_from_logits(functional_call(network, point, (x,)), y).mean()

    written_out = copy.deepcopy(model)
    for name, module in list(written_out.named_modules()):
        if isinstance(module, nn.LayerNorm):
            written_out.set_submodule(name, WrittenOut(module))
    exact = partial(torch.autograd.functional.hessian, vectorize=True)
    expected = exact(lambda w: loss(w, written_out), w)
    for hessian in (
        jacfwd(grad(loss))(w),
        jacrev(grad(loss))(w),
        exact(loss, w),
    ):
        torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-13 * expected.abs().max())


@pytest.mark.parametrize(
    "build, sizes, norms",
    [
        (tiny_vit, dict(norm="pre", pool="cls", activation="gelu"), 3),
        (tiny_vit, dict(norm="post", pool="mean", activation="gelu_tanh"), 2),
        (tiny_vit, dict(norm="pre", pool="mean", activation="relu"), 3),
        (tiny_mlp, dict(bias=True), 0),
        (tiny_mlp, dict(bias=False), 0),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_can_be_traced(build, sizes, norms):
    """At batch size 1, with its LayerNorms and linear maps whole."""
    model = build(**sizes)
    x = images(1)
    exported = torch.export.export(model, (x,), strict=False).run_decompositions({})
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count("aten.layer_norm.default") == norms
    assert called.count("aten.linear.default") == sum(
        isinstance(module, nn.Linear) for module in model.modules()
    )
    torch.testing.assert_close(exported.module()(x), model(x))
