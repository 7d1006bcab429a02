"""Norms of the blocks of a Hessian between groups of parameters: who is curved with whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.hessian.differentiation import refuse_not_finite
from utils.hessian.lanczos import power_of_two, uniform_start
from utils.hessian.losses import Losses
from utils.hessian.norms import operator_norm
from utils.networks import ViT

ROLES = {  # of the modules of a transformer's block
    "attention.query": "Q",
    "attention.key": "K",
    "attention.value": "V",
    "attention.out": "O",
    "mlp.fc1": "W1",
    "mlp.fc2": "W2",
    "norm1": "LN",
    "norm2": "LN",
}


Groups = dict[str, list[str]]  # label -> names or patterns of parameters


def parameter_groups(model: nn.Module) -> Groups:
    """Groups of parameters, label -> names: what the block matrix of norms is taken over.

    model  the network

    A ViT has embedding (patches, positions, CLS), Q, K, V, O, W1, W2, LN of every layer, and head
    (with the final LayerNorm); weight and bias stay together. Any other module: one group for each
    submodule that owns parameters.

    >>> parameter_groups(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
    {'0': ['0.weight', '0.bias']}
    """
    groups: Groups = {}
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0] or name
        label = _label(owner) if isinstance(model, ViT) else owner
        groups.setdefault(label, []).append(name)
    if "head" not in groups:
        return groups
    return dict(sorted(groups.items(), key=lambda g: (g[0] == "head", g[0] != "embedding")))


def _label(owner: str) -> str:
    if owner.startswith("blocks."):
        _, layer, inner = owner.split(".", 2)
        return f"{ROLES[inner]} {int(layer) + 1}"
    return "head" if owner in ("head", "norm") else "embedding"


@dataclass(frozen=True)
class BlockNorms:
    """Spectral norms of the blocks of H_k between groups of parameters.

    groups    labels (m,)
    values    (m, m), symmetric [loss/weight^2]
    residual  (m, m): |B^T B v - s^2 v| / s of the unit vector behind each norm s
    """

    groups: list[str]
    values: np.ndarray
    residual: np.ndarray

    def rows(self) -> list[dict]:
        """One row for each block: row and column by label, value, residual; column by column."""
        return [
            {
                "row": row,
                "column": column,
                "value": self.values[i, j],
                "residual": self.residual[i, j],
            }
            for j, column in enumerate(self.groups)
            for i, row in enumerate(self.groups)
        ]


def hessian_block_norms(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    *,
    groups: Groups | None = None,
    tolerance: float = 1e-2,
    max_steps: int = 20,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> BlockNorms:
    """The norm of H_k[g, g'] for every pair of groups of parameters.

    model, x, y, loss  the network, inputs (k, ...), labels (k,) and the loss's name
    groups             label -> names or patterns; `parameter_groups` if None
    tolerance          of the residual, relative to the value
    max_steps          Lanczos steps, of two products, for each pair at most
    seed               of the random starts
    progress           called with 1 after each of the m(m+1)/2 pairs
    options            of `Losses`, which says what is refused

    Lanczos on B^T B for the block B = H[g, g'], two products a step, each of which walks only
    through what the two groups touch. Cost: about 10 products a pair.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> hessian_block_norms(model, torch.ones(4, 2), [0, 1, 1, 0]).values.shape
    (2, 2)
    """
    losses = Losses(model, x, y, loss, **options)
    groups = parameter_groups(model) if groups is None else groups
    names = list(groups)
    start = uniform_start((losses.P,), losses, seed)
    image = losses.hessian()(start)
    refuse_not_finite(image)
    unit = power_of_two(image[None])
    unit = 1.0 if unit is None else unit.item()  # squares of the blocks stay in range
    values = np.zeros((len(names), len(names)))
    residual = np.zeros_like(values)
    for i, row in enumerate(names):
        for j, column in enumerate(names[: i + 1]):
            block = _Block(losses, groups[row], groups[column], unit)
            norm = operator_norm(
                block,
                block.start(seed),
                tolerance=2 * tolerance,
                max_steps=min(max_steps, block.size),
                least=3,
            )
            s = math.sqrt(norm.value)
            values[i, j] = values[j, i] = unit * s
            residual[i, j] = residual[j, i] = unit * norm.residual / s if s > 0 else 0.0
            if progress is not None:
                progress(1)
    return BlockNorms(names, values, residual)


class _Block:
    """v -> B^T B v for the block B of H / unit between two groups, v zero outside the second."""

    def __init__(self, losses: Losses, first: list[str], second: list[str], unit: float):
        self.pair = losses.moving([*first, *second])
        self.H = self.pair.hessian()
        self.unit = unit
        self.outside, self.inside = (self._mask(losses, group) for group in (first, second))
        self.size = int(self.inside.sum())

    def _mask(self, losses: Losses, group: list[str]) -> Tensor:
        """The coordinates (P,) that belong to a group."""
        members = losses.moving(group).point
        parts = {n: torch.full_like(t, n in members) for n, t in self.pair.point.items()}
        return self.pair.flatten(parts).bool()

    def start(self, seed: int) -> Tensor:
        return torch.where(self.inside, uniform_start((self.pair.P,), self.pair, seed), 0.0)

    def __call__(self, v: Tensor) -> Tensor:
        image = torch.where(self.outside, self.H(v) / self.unit, 0.0)
        return torch.where(self.inside, self.H(image) / self.unit, 0.0)
