"""Tiny networks and inputs for all tests: float64, from a seed, the global generator untouched.

Images are (n, 1, 4, 4) and labels one of 3 classes unless said otherwise; every network takes them.
A chain is read once for a structure, in a second or less: take one of `NETWORKS` where one will do.
"""

import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.networks import build_model

F64 = torch.float64
VIT = dict(
    image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4
)
VIT |= dict(eps=1e-2)
MLP = dict(d_in=16, width=4, depth=1, n_classes=3, activation="gelu")


# --- inputs -----------------------------------------------------------------------------------


def images(n: int, channels: int = 1, side: int = 4, seed: int = 0) -> Tensor:
    """Standard normal pixels, (n, channels, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, side, side, generator=generator, dtype=F64)


def labels(n: int, n_classes: int = 3, seed: int = 0) -> Tensor:
    """Labels (n,): the classes in turn, from class `seed` on."""
    return (torch.arange(n) + seed) % n_classes


def examples(n: int = 5, seed: int = 0, n_classes: int = 3) -> tuple[Tensor, Tensor]:
    """Normal images (n, 1, 4, 4) and labels at random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=F64)
    return x, torch.randint(0, n_classes, (n,), generator=generator)


def uneven_examples(n: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same with images of different size, each up to four times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(n, 1, 1, 1, generator=generator, dtype=F64)
    x = x * torch.randn(n, 1, 4, 4, generator=generator, dtype=F64)
    return x, torch.randint(0, 3, (n,), generator=generator)


# --- networks ---------------------------------------------------------------------------------


def seeded(seed: int, build) -> nn.Module:
    """What `build` makes of the generator at `seed`, in float64, for evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval()


def tiny_vit(seed: int = 0, **sizes) -> nn.Module:
    """A fresh ViT of four patches and width 4: 203 parameters. `sizes` replace those of `VIT`."""
    return seeded(seed, lambda: build_model("vit", **VIT | sizes))


def tiny_mlp(seed: int = 0, **sizes) -> nn.Module:
    """A fresh MLP 16 -> 4 -> 4 -> 3, 92 parameters, no biases. `sizes` replace those of `MLP`."""
    return seeded(seed, lambda: build_model("mlp", **MLP | sizes))


def tiny_linear(seed: int = 0, d_in: int = 16, n_classes: int = 3) -> nn.Module:
    """Logistic regression on flattened inputs: with a penalty its loss has one minimiser."""

    def build():
        return nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.Linear(d_in, n_classes)))

    return seeded(seed, build)


def tiny_encoder(
    seed: int = 0, norm_first: bool = False, depth: int = 1, dropout: float = 0.0
) -> nn.Module:
    """A classifier on `nn.TransformerEncoder`, whose tokens are the four rows of an image."""
    return seeded(seed, lambda: Encoder(norm_first, depth, dropout))


class Encoder(nn.Module):
    """See `tiny_encoder`. It returns an object with `.logits`, as other libraries do."""

    def __init__(self, norm_first: bool, depth: int, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            4, 2, 5, dropout, "gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        h = self.encoder(x.flatten(1).unflatten(1, (4, 4)))  # (B, 4, 4)
        return SimpleNamespace(logits=self.head(h.mean(1)), hidden=None)


class Fused(nn.Module):
    """Fused attention and torch's layer norm with an affine weight: what a user's model looks
    like."""

    def __init__(self, n_classes: int = 3):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, n_classes)
        self.scale = nn.Parameter(torch.ones(4))
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.flatten(1).unflatten(1, (4, 4)))  # (B, 4, 4)
        z = F.layer_norm(h, (4,), self.scale, self.shift)
        q, k, v = self.qkv(z).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)  # (B, 2, 4, 2)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.layer_norm(h, (4,), self.scale, self.shift).mean(1))


class Heads(nn.Module):
    """nn.MultiheadAttention with a causal mask, read at its last token."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.triu(torch.ones(4, 4, dtype=torch.bool), 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).unflatten(1, (4, 4))
        mixed, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        return self.head(mixed[:, -1])


def convolutional() -> nn.Module:
    """Two convolutions, one with a stride and a padding, GroupNorm and tanh between them."""
    layers = [nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 2, 2, 1)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), nn.Linear(8, 3))


class Hidden(nn.Module):
    """A logit with a gradient along two weights and curvature along others: the gradient never
    sees the norm."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.tensor([0.3, 0.2]))
        self.unseen = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(1)[:, :2] @ self.seen + 0.1 * self.seen[1] ** 2
        f = (f + (self.unseen**2 * torch.arange(1.0, 7).to(x)).sum() * 5)[:, None]
        return torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], 1)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# --- weights ----------------------------------------------------------------------------------


def randomised(model: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """The model in float64, every weight random, of size `scale` over the root of its inputs; gains
    about 1. No term of a derivative is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p.shape[-1] if p.ndim == 2 and name != "pos" else 1
            gain = 1.0 if p.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
            noise = torch.randn(p.shape, generator=generator, dtype=F64)
            p.copy_(scale * noise / math.sqrt(fan_in) + gain)
    return model


def random_vit(seed: int = 0, scale: float = 1.0, **sizes) -> nn.Module:
    """A ViT with every weight random."""
    return randomised(tiny_vit(**sizes), seed, scale)


def random_mlp(seed: int = 0, scale: float = 1.0, **sizes) -> nn.Module:
    """An MLP with biases, every weight random."""
    return randomised(tiny_mlp(**{"bias": True} | sizes), seed, scale)


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector (P,), in the order of `named_parameters`."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


NETWORKS = {
    "two blocks": lambda: random_vit(1, depth=2),
    "pre cls gelu": lambda: random_vit(1),
    "pre mean gelu_tanh": lambda: random_vit(2, pool="mean", activation="gelu_tanh", n_heads=1),
    "post cls relu": lambda: random_vit(3, norm="post", activation="relu"),
    "post mean gelu": lambda: random_vit(4, norm="post", pool="mean"),
    "no block": lambda: random_vit(5, depth=0),
    "mlp": lambda: random_mlp(6),
    "mlp relu without bias": lambda: random_mlp(7, activation="relu", bias=False),
    "encoder pre": lambda: randomised(tiny_encoder(norm_first=True), 8),
    "encoder post": lambda: randomised(tiny_encoder(), 9),
    "fused": lambda: randomised(Fused(), 12),
    "heads with a mask": lambda: randomised(Heads(), 10),
    "convolutions": lambda: randomised(convolutional(), 11, 0.7),
}
CASES = ["two blocks", "pre cls gelu", "pre mean gelu_tanh", "post cls relu", "post mean gelu mse"]
CASES += ["mlp", "mlp relu without bias mse", "fused", "fused mse", "encoder pre", "encoder post"]


def small_first(names, slow=("two blocks",)) -> list:
    """For `parametrize`: what costs most, or is near to another, among the slow tests."""
    mark = pytest.mark.slow
    return [pytest.param(name, marks=mark) if name in slow else name for name in names]


def case(name: str) -> tuple[nn.Module, Tensor, Tensor, str]:
    """One of `NETWORKS`, five examples and a loss: squared error where the name ends in mse."""
    loss = "mse" if name.endswith(" mse") else "cross_entropy"
    return NETWORKS[name.removesuffix(" mse")](), *examples(), loss


def vit_pilot(n: int = 12, seed: int = 0, **sizes) -> tuple[nn.Module, Tensor, Tensor]:
    """A fresh ViT and a sample of n images."""
    return tiny_vit(seed, **sizes), *examples(n, seed)


def linear_pilot(n: int = 60, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Logistic regression on five numbers and a sample of n examples."""
    x = images(n, channels=5, side=1, seed=seed).flatten(1)
    return tiny_linear(seed, d_in=5), x, examples(n, seed)[1]
