"""Tiny networks and inputs for all tests: float64, from a seed, the global generator untouched.

Images are (n, 1, 4, 4) and labels one of 3 classes unless said otherwise; every network takes them.
`randomised` moves every parameter, so that no term of a derivative is zero by initialisation.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from utils.networks import build_model

VIT = dict(
    image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4
)
MLP = dict(d_in=16, width=4, depth=1, n_classes=3, activation="gelu")


def images(n: int, channels: int = 1, side: int = 4, seed: int = 0) -> Tensor:
    """Standard normal pixels, (n, channels, side, side)."""
    return _normal((n, channels, side, side), seed)


def labels(n: int, n_classes: int = 3, seed: int = 0) -> Tensor:
    """Labels (n,): the classes in turn, from class `seed` on."""
    return (torch.arange(n) + seed) % n_classes


def tiny_vit(seed: int = 0, **sizes) -> nn.Module:
    """A fresh ViT of four patches and width 4: 203 parameters. `sizes` replace those of `VIT`."""
    return _seeded(seed, lambda: build_model("vit", **VIT | sizes))


def tiny_mlp(seed: int = 0, **sizes) -> nn.Module:
    """A fresh MLP 16 -> 4 -> 4 -> 3, 92 parameters, no biases. `sizes` replace those of `MLP`."""
    return _seeded(seed, lambda: build_model("mlp", **MLP | sizes))


def tiny_linear(seed: int = 0, d_in: int = 16, n_classes: int = 3) -> nn.Module:
    """Logistic regression on flattened inputs: with a penalty its loss has one minimiser."""

    def build():
        return nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.Linear(d_in, n_classes)))

    return _seeded(seed, build)


def tiny_encoder(seed: int = 0, n_classes: int = 3, d_model: int = 4) -> nn.Module:
    """A classifier on `nn.TransformerEncoder`, whose tokens are the four rows of an image."""
    return _seeded(seed, lambda: Encoder(n_classes, d_model))


class Encoder(nn.Module):
    """See `tiny_encoder`."""

    def __init__(self, n_classes: int, d_model: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            d_model, nhead=2, dim_feedforward=5, dropout=0.0, activation="gelu", batch_first=True
        )
        self.embed = nn.Linear(4, d_model)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.head = nn.Linear(d_model, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(self.embed(x[:, 0]))  # (B, 4, 4) -> (B, 4, d)
        return self.head(h.mean(1))


def randomised(model: nn.Module, seed: int = 0, scale: float = 0.7) -> nn.Module:
    """The model, each of its parameters drawn anew: normal, of standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector (P,), in the order of `named_parameters`."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _seeded(seed: int, build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval()
