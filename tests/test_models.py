"""The networks against torch's own functional operations, and what a user's own model file may do."""

import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import utils.models as models
from utils.models import (
    MLPConfig,
    ViTConfig,
    build_for_data,
    build_model,
    describe,
    load_state,
    loss_from_logits,
    prepared_copy,
    read_weights,
    restore,
    second_order_mode,
)

SIZES = dict(image_size=4, channels=2, patch_size=2, n_classes=3, depth=2, n_heads=2, d_model=6, d_ff=5)
INFO = {"input_shape": [2, 4, 4], "n_classes": 3, "name": "tiny"}


def one_sentence(message) -> bool:
    """Ends in a full stop and has no other sentence in it."""
    message = str(message)
    return message.endswith(".") and ". " not in message and "\n" not in message


def random_vit(seed=0, **sizes):
    """A ViT in float64 whose weights, biases and LayerNorm parameters are all random."""
    model = build_model("vit", **(SIZES | sizes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def reference_forward(model, x):
    """The same function of the same weights, by torch's convolution, layer norm and multi-head attention."""
    c, w = model.config, model.state_dict()
    kernel = w["embed.weight"].reshape(c.d_model, c.channels, c.patch_size, c.patch_size)
    h = F.conv2d(x, kernel, w["embed.bias"], stride=c.patch_size).flatten(2).transpose(1, 2)
    if c.pool == "cls":
        h = torch.cat([w["cls"].repeat(len(x), 1)[:, None], h], 1)
    h = h + w["pos"]
    act = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}[c.activation]

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
    model = random_vit(norm=norm, pool=pool, activation=activation, eps=eps, n_heads=n_heads)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(x)
        assert out.shape == (3, 3)
        torch.testing.assert_close(out, reference_forward(model, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("image_size, patch_size, channels", [(4, 4, 1), (6, 2, 3), (5, 1, 1)])
def test_vit_shapes_and_names(depth, image_size, patch_size, channels):
    sizes = SIZES | dict(image_size=image_size, patch_size=patch_size, channels=channels, depth=depth)
    n_patches, d, d_ff = (image_size // patch_size) ** 2, sizes["d_model"], sizes["d_ff"]
    for norm in ("pre", "post"):
        for pool in ("cls", "mean"):
            model = build_model("vit", **sizes, norm=norm, pool=pool)
            assert model(torch.randn(2, channels, image_size, image_size)).shape == (2, 3)
            assert model.pos.shape == (n_patches + (pool == "cls"), d)
            block = 4 * (d * d + d) + 2 * d * d_ff + d_ff + d + 4 * d
            expected = (channels * patch_size**2 + 1) * d + (pool == "cls") * d + model.pos.numel()
            expected += depth * block + (norm == "pre") * 2 * d + 3 * (d + 1)
            assert sum(p.numel() for p in model.parameters()) == expected
            assert hasattr(model, "norm") == (norm == "pre") and hasattr(model, "cls") == (pool == "cls")


def test_patches_are_read_row_by_row():
    model = build_model("vit", **SIZES)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    patches = model.patches(x)
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # upper right, channel by channel
    torch.testing.assert_close(patches, F.unfold(x, 2, stride=2).transpose(1, 2))


@pytest.mark.parametrize("depth, bias", [(0, False), (1, True), (3, False)])
def test_mlp_layout(depth, bias):
    """d_in -> width, then `depth` layers width -> width, then the classes."""
    model = build_model("mlp", d_in=8, width=5, depth=depth, n_classes=3, bias=bias, activation="gelu").double()
    shapes = [tuple(layer.weight.shape) for layer in model.layers]
    assert shapes == [(5, 8), *[(5, 5)] * depth, (3, 5)]
    assert all((layer.bias is not None) == bias for layer in model.layers)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    h = x.reshape(2, 8)
    for layer in model.layers[:-1]:
        h = F.gelu(h @ layer.weight.T + (layer.bias if bias else 0))
    out = h @ model.layers[-1].weight.T + (model.layers[-1].bias if bias else 0)
    torch.testing.assert_close(model(x), out)


def test_sizes_that_do_not_fit():
    cases = [
        (ViTConfig, SIZES, dict(patch_size=3), "patch_size"),
        (ViTConfig, SIZES, dict(n_heads=4), "n_heads"),
        (ViTConfig, SIZES, dict(n_heads=0), "n_heads"),
        (ViTConfig, SIZES, dict(patch_size=0), "patch_size"),
        (ViTConfig, SIZES, dict(depth=-1), "depth"),
        (ViTConfig, SIZES, dict(d_ff=0), "d_ff"),
        (ViTConfig, SIZES, dict(norm="middle"), "norm"),
        (ViTConfig, SIZES, dict(activation="tanh"), "activation"),
        (ViTConfig, SIZES, dict(pool="max"), "pool"),
        (MLPConfig, dict(d_in=4, width=3, depth=1, n_classes=2), dict(activation="tanh"), "activation"),
        (MLPConfig, dict(d_in=4, width=3, depth=1, n_classes=2), dict(width=0), "width"),
    ]
    for config, sizes, wrong, named in cases:
        with pytest.raises(ValueError) as error:
            config(**(sizes | wrong))
        assert named in str(error.value) and one_sentence(error.value)
    for kind, sizes in (("cnn", {}), ("vit", {"depth": 1}), ("mlp", {"heads": 2}), ("vit", SIZES | {"width": 3})):
        with pytest.raises(ValueError) as error:
            build_model(kind, **sizes)
        assert kind in str(error.value) and one_sentence(error.value)


def test_build_for_data_completes_the_sizes():
    sizes = dict(patch_size=2, depth=1, n_heads=2, d_model=6, d_ff=5)
    vit = build_for_data("vit", INFO, **sizes)
    assert (vit.config.image_size, vit.config.channels, vit.config.n_classes) == (4, 2, 3)
    mlp = build_for_data("mlp", INFO, **sizes)  # takes d_model as its width and leaves what it has not
    assert (mlp.config.d_in, mlp.config.width, mlp.config.depth, mlp.config.n_classes) == (32, 6, 1, 3)
    assert build_for_data("mlp", {"input_shape": [7], "n_classes": 2}, **sizes).config.d_in == 7
    for shape in ([7], [1, 4, 6]):
        with pytest.raises(ValueError, match="mlp") as error:
            build_for_data("vit", {"input_shape": shape, "n_classes": 2}, **sizes)
        assert one_sentence(error.value)
    with pytest.raises(ValueError, match="own") as error:
        build_for_data("resnet", INFO)
    assert one_sentence(error.value)


def test_losses():
    f = torch.randn(5, 4, dtype=torch.float64)
    f[0] = torch.tensor([1000.0, 0, -1000, 3])
    y = torch.tensor([1, 0, 3, 2, 1])
    torch.testing.assert_close(loss_from_logits(f, y), F.cross_entropy(f, y, reduction="none"))
    target = F.one_hot(y, 4).double()
    torch.testing.assert_close(loss_from_logits(f, y, "mse"), F.mse_loss(f, target, reduction="none").mean(1))
    with pytest.raises(ValueError, match="hinge") as error:
        loss_from_logits(f, y, "hinge")
    assert one_sentence(error.value)


# --- a user's own model -----------------------------------------------------------------------------


def user_folder(tmp_path, package):
    """A folder whose model file imports its own `utils`, a package or one file."""
    folder = tmp_path / "their code"
    if package:
        (folder / "utils").mkdir(parents=True)
        (folder / "utils" / "__init__.py").write_text("")
        (folder / "utils" / "models.py").write_text("WIDTH = 7\nOWNER = 'user'\n")
        line = "from utils.models import OWNER, WIDTH"
    else:
        folder.mkdir()
        (folder / "utils.py").write_text("WIDTH = 7\nOWNER = 'user'\n")
        line = "from utils import OWNER, WIDTH"
    (folder / "net.py").write_text(
        f"""import math
import torch
{line}

assert OWNER == "user"


class Net(torch.nn.Module):
    def __init__(self, info):
        super().__init__()
        self.a = torch.nn.Linear(math.prod(info["input_shape"]), WIDTH)
        self.b = torch.nn.Linear(WIDTH, info["n_classes"])

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flatten(1))))


def make(info):
    model = Net(info)
    info.clear()  # a copy: the caller's stays whole
    return model


def broken(info):
    raise RuntimeError("inside")


def number(info):
    return 3


constant = 4
"""
    )
    return folder / "net.py"


@pytest.mark.parametrize("package", [True, False])
def test_user_file_with_its_own_utils(tmp_path, package):
    path = user_folder(tmp_path, package)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "utils"}
    search, info = list(sys.path), dict(INFO)
    model = build_for_data(f"{path}:make", info, depth=3)
    assert model.a.weight.shape == (7, 32) and info == INFO
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "utils"}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert sys.path == search and sys.modules["utils.models"] is models
    from utils.models import ViT

    assert ViT is models.ViT
    # it goes on working after our modules are back, copies included
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(prepared_copy(model)(x.double()), model(x).double(), rtol=1e-5, atol=1e-6)


def test_user_file_that_fails_leaves_our_modules(tmp_path):
    path = user_folder(tmp_path, True)
    search = list(sys.path)
    with pytest.raises(RuntimeError, match="inside"):
        build_for_data(f"{path}:broken", INFO)
    assert sys.modules["utils.models"] is models and sys.path == search
    for spec in (f"{path}:number", f"{path}:missing", f"{path}:constant", f"{tmp_path}/none.py:make"):
        with pytest.raises(ValueError) as error:
            build_for_data(spec, INFO)
        assert one_sentence(error.value)
        assert sys.modules["utils.models"] is models and sys.path == search


def test_describe_and_restore(tmp_path):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    user = f"{user_folder(tmp_path, True)}:make"
    for spec, model in (
        ("vit", random_vit(3, norm="post", pool="mean", eps=0.1, activation="relu")),
        ("mlp", build_model("mlp", d_in=32, width=4, depth=2, n_classes=3, bias=True).double()),
        (user, build_for_data(user, INFO).double()),
    ):
        file = tmp_path / "w.safetensors"
        save_file(model.state_dict(), file)
        again = restore(describe(model, spec), read_weights(str(file)), INFO)
        assert next(again.parameters()).dtype == torch.float64
        assert torch.equal(again(x), model(x))


def test_weights_that_do_not_fit(tmp_path):
    model, other = random_vit(), random_vit(depth=1)
    file = tmp_path / "w.safetensors"
    save_file(other.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-9])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wrong_shape = {name: t[..., :1].clone() for name, t in model.state_dict().items()}
    for call in (
        lambda: load_state(model, other.state_dict()),
        lambda: load_state(model, wrong_shape),
        lambda: load_state(model, {}),
        lambda: read_weights(str(file)),
        lambda: read_weights(str(tmp_path / "missing.safetensors")),
        lambda: read_weights(str(tmp_path)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert set(before) == set(model.state_dict())
    # the weights' dtype is taken over
    assert load_state(build_model("vit", **SIZES), before).pos.dtype == torch.float64


def test_prepared_copy_and_mode():
    model = random_vit().float().train()
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


def test_layer_norm_constant_row():
    """A constant row has variance 0: eps alone stands under the root, and nothing is nan."""
    layer = models.LayerNorm(4, 1e-5).double()
    with torch.no_grad():
        layer.bias.fill_(2.0)
    assert layer(torch.full((1, 4), 3.0, dtype=torch.float64)).tolist() == [[2.0] * 4]
    step = torch.tensor([[1e-3, -1e-3, 0, 0]], dtype=torch.float64)
    rho = math.sqrt(2e-6 / 4 + 1e-5)
    torch.testing.assert_close(layer(3 + step) - 2, step / rho)
