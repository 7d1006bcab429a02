"""The networks: a vision transformer and an MLP in primitive operations, and a user's own module.

Attention and LayerNorm are written out, because fused kernels have no double backward and
because the bounds name every intermediate quantity. Symbols follow the paper: N tokens,
d width, H heads, d_h = d/H, d_ff MLP width, K classes, `rho` the LayerNorm scale.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu}
LOSSES = ("cross_entropy", "mse")


def _check_sizes(config) -> None:
    for name, size in vars(config).items():
        least = 0 if name == "depth" else 1
        if type(size) is int and size < least:
            raise ValueError(f"{name} is {size}: give {least} or more.")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`; `norm` is the place of LayerNorm, `pool` what the head reads."""

    image_size: int
    channels: int
    patch_size: int
    n_classes: int
    depth: int
    n_heads: int
    d_model: int
    d_ff: int
    norm: str = "pre"
    activation: str = "gelu"
    pool: str = "cls"
    eps: float = 1e-5

    def __post_init__(self):
        _check_sizes(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}: choose a divisor."
            )
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model {self.d_model}: choose a divisor.")
        for name, allowed in (("norm", ("pre", "post")), ("activation", tuple(ACTIVATIONS)), ("pool", ("cls", "mean"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an `MLP`: d_in -> width, then `depth` layers width -> width, then the classes."""

    d_in: int
    width: int
    depth: int
    n_classes: int
    activation: str = "relu"
    bias: bool = False

    def __post_init__(self):
        _check_sizes(self)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}.")


class LayerNorm(nn.Module):
    """weight * P x / rho + bias over the last axis, P x = x - mean(x), rho = sqrt(|P x|^2 / d + eps).

    Source: Ba, Kiros, Hinton (2016); (eq:layer-norm).
    """

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        centred = x - x.mean(-1, keepdim=True)
        rho = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return self.weight * (centred / rho) + self.bias


class Attention(nn.Module):
    """Multi-head self-attention W_O [A_1 V_1 | ... | A_H V_H] + b_O, A_h = softmax(Q_h K_h^T / sqrt(d_h))."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, d) -> (B, N, d)
        B, N, d = x.shape

        def heads(z):  # (B, N, d) -> (B, H, N, d_h)
            return z.view(B, N, self.n_heads, d // self.n_heads).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(d // self.n_heads)  # (B, H, N, N)
        mixed = scores.softmax(-1) @ v  # (B, H, N, d_h)
        return self.out(mixed.transpose(1, 2).reshape(B, N, d))


class MultilayerPerceptron(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2 on every token."""

    def __init__(self, d_model: int, d_ff: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    """pre: h + Attn(LN1 h), then h + MLP(LN2 h); post: LN1(h + Attn h), then LN2(h + MLP h)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm_place = config.norm
        self.norm1 = LayerNorm(config.d_model, config.eps)
        self.attention = Attention(config.d_model, config.n_heads)
        self.norm2 = LayerNorm(config.d_model, config.eps)
        self.mlp = MultilayerPerceptron(config.d_model, config.d_ff, config.activation)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm_place == "pre":
            h = h + self.attention(self.norm1(h))
            return h + self.mlp(self.norm2(h))
        h = self.norm1(h + self.attention(h))
        return self.norm2(h + self.mlp(h))


class ViT(nn.Module):
    """Vision transformer: images (B, C, S, S) -> logits (B, K).

    h0 = [cls ; W_E patch + b_E] + pos, `depth` blocks, pooling, a final LayerNorm (pre-norm only), the head.
    Without a CLS token (`pool="mean"`) the tokens are averaged before the final LayerNorm. Positions start at
    the scale of the patches (standard deviation 0.5): a small network that stays near its initial weights would
    hardly use them otherwise.
    Source: Dosovitskiy et al. (2021), section 3.1; the paper's section "Setting".
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        n_patches = (config.image_size // config.patch_size) ** 2
        self.embed = nn.Linear(config.channels * config.patch_size**2, config.d_model)
        if config.pool == "cls":
            self.cls = nn.Parameter(0.5 * torch.randn(config.d_model))
        self.pos = nn.Parameter(0.5 * torch.randn(n_patches + (config.pool == "cls"), config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.norm == "pre":
            self.norm = LayerNorm(config.d_model, config.eps)
        self.head = nn.Linear(config.d_model, config.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patches(self, x: Tensor) -> Tensor:
        """Images (B, C, S, S) -> patches (B, N_p, C p^2), row by row."""
        c = self.config
        B, side, p = x.shape[0], c.image_size // c.patch_size, c.patch_size
        x = x.reshape(B, c.channels, side, p, side, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, c.channels * p * p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(self.patches(x))  # (B, N_p, d)
        if self.config.pool == "cls":
            h = torch.cat([self.cls.expand(h.shape[0], 1, -1), h], dim=1)
        h = h + self.pos
        for block in self.blocks:
            h = block(h)
        v = h[:, 0] if self.config.pool == "cls" else h.mean(1)
        if self.config.norm == "pre":
            v = self.norm(v)
        return self.head(v)


class MLP(nn.Module):
    """Fully connected network on flattened inputs: (B, ...) -> logits (B, K). Source: Kiselev, Grabovoy (2024)."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        widths = [config.d_in] + [config.width] * (config.depth + 1) + [config.n_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=config.bias) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.config.activation](layer(x))
        return self.layers[-1](x)


KINDS = {"vit": (ViT, ViTConfig), "mlp": (MLP, MLPConfig)}


def build_model(kind: str, **sizes) -> nn.Module:
    """A fresh "vit" or "mlp"; `sizes` are the fields of its config. Initialised from torch's global generator."""
    if kind not in KINDS:
        raise ValueError(f"model is {kind!r}: choose vit, mlp, or PATH.py:function for your own.")
    module, config = KINDS[kind]
    try:
        return module(config(**sizes))
    except TypeError as error:
        raise ValueError(f"The sizes of {kind!r} do not fit: {error}.") from None


def build_for_data(spec: str, info: dict, **sizes) -> nn.Module:
    """The model that the notebooks train: `spec` is "vit", "mlp" or "PATH.py:function".

    `info` describes the data set (`Dataset.info`): its input shape and number of classes complete
    `sizes`, of which each kind takes what it has (for mlp the width is `d_model`). A user's function
    is called with `info` and returns an `nn.Module`; it takes no sizes.
    """
    if ".py:" in spec:
        return _user_module(spec, info)
    shape = tuple(info["input_shape"])
    if spec == "vit":
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"model vit needs square images (C, S, S) and the data have shape {shape}: use mlp.")
        sizes |= {"image_size": shape[1], "channels": shape[0]}
    elif spec == "mlp":
        sizes |= {"d_in": math.prod(shape), "width": sizes.get("d_model")}
    if spec in KINDS:
        taken = {f.name for f in fields(KINDS[spec][1])}
        sizes = {name: value for name, value in sizes.items() if name in taken}
    return build_model(spec, n_classes=info["n_classes"], **sizes)


def describe(model: nn.Module, spec: str) -> dict:
    """What `restore` needs beside the weights: the spec and, for our own networks, the config."""
    return {"model": spec, "config": asdict(model.config) if isinstance(model, ViT | MLP) else None}


def restore(description: dict, state: dict[str, Tensor], info: dict) -> nn.Module:
    """The trained network from `describe`'s dictionary and its tensors by name."""
    if description["config"] is None:
        model = build_for_data(description["model"], info)
    else:
        model = build_model(description["model"], **description["config"])
    return load_state(model, state)


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file. Raises ValueError where it is not there or not whole."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"There is no weights file {path}: give the path of a .safetensors file.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole .safetensors file ({error}): save the weights anew.") from None


def load_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Copy tensors into the model, which takes their dtype. Raises ValueError where names or shapes differ."""
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise ValueError(f"The weights do not fit the model ({first}): use the file that this model wrote.") from None
    return model


@contextmanager
def _own_imports(folder: Path):
    """Import from `folder` first, with its own `utils`, if it has one, in place of ours; restored afterwards."""

    def ours():
        return {n: m for n, m in sys.modules.items() if n == "utils" or n.startswith("utils.")}

    own = (folder / "utils").is_dir() or (folder / "utils.py").is_file()
    saved, path = ours() if own else {}, list(sys.path)
    for name in saved:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in ours() if own else ():
            del sys.modules[name]
        sys.modules.update(saved)


def _user_module(spec: str, info: dict) -> nn.Module:
    path, function = spec.rsplit(":", 1)
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {spec.rsplit(':', 1)[0]}: give model as PATH.py:function.")
    with _own_imports(path.parent):
        module_spec = importlib.util.spec_from_file_location(f"user_model_{path.stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{path.name} has no function {function!r}: give model as PATH.py:function.")
        model = getattr(module, function)(copy.deepcopy(info))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} returned {type(model).__name__}: it has to return a torch.nn.Module.")
    return model


# --- what every quantity of the study is made of -------------------------------------------------


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output (n, K): a tensor, or an object with `.logits`."""
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def loss_from_logits(f: Tensor, y: Tensor, loss: str = "cross_entropy") -> Tensor:
    """Per-sample loss (n,): cross-entropy, or the mean over classes of the squared difference to one-hot."""
    if loss == "cross_entropy":
        return f.logsumexp(-1) - f.gather(-1, y[..., None])[..., 0]
    if loss == "mse":
        target = (y[..., None] == torch.arange(f.shape[-1], device=f.device)).to(f.dtype)
        return (f - target).square().mean(-1)
    raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")


@contextmanager
def second_order_mode():
    """Attention by its mathematical kernel and without fast paths: the fused ones have no second derivative."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def refuse_random_or_batch_dependent(model: nn.Module, x: Tensor) -> None:
    """Raise ValueError unless `l_i(w)` is a function of `w` and sample i alone: no dropout, no batch statistics."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} uses batch statistics: replace it (LayerNorm, GroupNorm) and run again.")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{name} is dropout with p = {module.p}: build the model with p = 0 and run again.")
    with torch.no_grad(), second_order_mode():
        together, again, alone = logits(model, x[:2]), logits(model, x[:2]), logits(model, x[:1])
    if together.ndim != 2:
        raise ValueError(f"The model returns shape {tuple(together.shape)}: it has to return logits (n, classes).")
    if not together.isfinite().all():
        raise ValueError("The model's output is not a finite number: look at its weights and at the inputs.")
    if not torch.equal(together, again):
        raise ValueError("The model gives two outputs for one input: switch its randomness off and run again.")
    if not torch.allclose(together[:1], alone, rtol=1e-4, atol=1e-5):
        raise ValueError("The model's output for a sample depends on the rest of the batch: remove that and run again.")


def prepared_copy(model: nn.Module, dtype: torch.dtype = torch.float64, device=None) -> nn.Module:
    """A copy in eval mode, `dtype` and on `device`; the model handed in, its `.grad` and modes stay as they are."""
    twin = copy.deepcopy(model).to(device=device, dtype=dtype).eval()
    for p in twin.parameters():
        p.grad = None
        p.requires_grad_(True)
    return twin
