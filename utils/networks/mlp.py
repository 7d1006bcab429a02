"""A fully connected network, as in the published experiments on the convergence of the surface."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from utils.networks.sizes import ACTIVATIONS, check_choice, check_sizes


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an `MLP`: d_in -> width, then `depth` layers width -> width, then `n_classes`.

    activation  "gelu", "gelu_tanh" or "relu", after every layer but the last
    bias        whether the layers have one

    Raises ValueError where a size is too small or the activation is another.
    """

    d_in: int
    width: int
    depth: int
    n_classes: int
    activation: str = "relu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self)
        check_choice("activation", self.activation, ACTIVATIONS)


class MLP(nn.Module):
    """Fully connected network on flattened inputs: (B, ...) -> logits (B, K).

    Source: Kiselev, Grabovoy (2024).

    >>> import torch
    >>> network = MLP(MLPConfig(d_in=8, width=5, depth=1, n_classes=3))
    >>> network(torch.zeros(2, 2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        widths = [config.d_in] + [config.width] * (config.depth + 1) + [config.n_classes]
        self.layers = nn.ModuleList(
            nn.Linear(d_from, d_to, bias=config.bias) for d_from, d_to in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.config.activation]
        x = x.flatten(1)  # (B, d_in)
        for layer in self.layers[:-1]:
            x = activation(layer(x))  # (B, width)
        return self.layers[-1](x)
