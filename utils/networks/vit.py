"""A vision transformer with explicit attention and without dropout.

Symbols follow the paper: B images in a batch, N tokens, d width, H heads, d_h = d/H, d_ff width of
a block's MLP, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.networks.sizes import ACTIVATIONS, check_choice, check_sizes


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`. Raises ValueError where they do not fit together.

    image_size  side S of the square images [pixels]; `channels` C of each
    patch_size  side p of a patch [pixels], a divisor of S
    n_classes   K, the number of logits
    depth       blocks, 0 or more
    n_heads     H, a divisor of d_model
    d_model     d, the width of a token
    d_ff        width of the MLP in a block
    norm        place of LayerNorm in a block, "pre" or "post"
    activation  "gelu", "gelu_tanh" or "relu"
    pool        what the head reads: the "cls" token, or the "mean" of the tokens
    eps         of LayerNorm, added to the variance
    """

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

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}: "
                "choose a divisor."
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads {self.n_heads} does not divide d_model {self.d_model}: choose a divisor."
            )
        check_choice("norm", self.norm, ("pre", "post"))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("pool", self.pool, ("cls", "mean"))


class Attention(nn.Module):
    """Multi-head self-attention W_O [A_1 V_1 | ... | A_H V_H] + b_O.

    A_h = softmax(Q_h K_h^T / sqrt(d_h)). Source: Vaswani et al. (2017), section 3.2.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, N, d = x.shape
        d_head = d // self.n_heads

        def heads(z: Tensor) -> Tensor:
            z = z.view(B, N, self.n_heads, d_head)  # (B, N, d) -> (B, N, H, d_h)
            return z.transpose(1, 2)  # (B, H, N, d_h)

        q = heads(self.query(x))
        k = heads(self.key(x))
        v = heads(self.value(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(d_head)  # (B, H, N, N)
        mixed = scores.softmax(-1) @ v  # (B, H, N, d_h)
        mixed = mixed.transpose(1, 2).reshape(B, N, d)  # the heads side by side: (B, N, d)
        return self.out(mixed)


class MultilayerPerceptron(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2 on every token."""

    def __init__(self, d_model: int, d_ff: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        return self.fc2(activation(self.fc1(x)))  # (B, N, d) -> (B, N, d_ff) -> (B, N, d)


class Block(nn.Module):
    """pre: h + Attn(LN1 h), then h + MLP(LN2 h); post: LN1(h + Attn h), then LN2(h + MLP h)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm_place = config.norm
        self.norm1 = nn.LayerNorm(config.d_model, config.eps)
        self.attention = Attention(config.d_model, config.n_heads)
        self.norm2 = nn.LayerNorm(config.d_model, config.eps)
        self.mlp = MultilayerPerceptron(config.d_model, config.d_ff, config.activation)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm_place == "pre":
            h = h + self.attention(self.norm1(h))
            return h + self.mlp(self.norm2(h))
        h = self.norm1(h + self.attention(h))
        return self.norm2(h + self.mlp(h))


class ViT(nn.Module):
    """Vision transformer: images (B, C, S, S) -> logits (B, K).

    h0 = [cls ; W_E patch + b_E] + pos, `depth` blocks, pooling, a final LayerNorm (pre-norm only),
    the head. Without a CLS token (`pool="mean"`) tokens are averaged before the final LayerNorm.
    Positions start at the scale of the patches (standard deviation 0.5): a small network that stays
    near its initial weights would hardly use them otherwise. The initial weights are drawn from
    torch's global generator.
    Source: Dosovitskiy et al. (2021), section 3.1; the paper's section "Setting".

    >>> config = ViTConfig(image_size=4, channels=1, patch_size=2, n_classes=3,
    ...                    depth=1, n_heads=2, d_model=4, d_ff=8)
    >>> ViT(config)(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        n_patches = (config.image_size // config.patch_size) ** 2
        has_cls = config.pool == "cls"
        self.embed = nn.Linear(config.channels * config.patch_size**2, d)
        if has_cls:
            self.cls = nn.Parameter(0.5 * torch.randn(d))
        self.pos = nn.Parameter(0.5 * torch.randn(n_patches + has_cls, d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.norm == "pre":
            self.norm = nn.LayerNorm(d, config.eps)
        self.head = nn.Linear(d, config.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patches(self, x: Tensor) -> Tensor:
        """Images x (B, C, S, S) -> patches (B, N_p, C p^2), row by row, each channel by channel."""
        B, C, p = len(x), self.config.channels, self.config.patch_size
        S = self.config.image_size
        if x.shape[1:] not in ((C, S, S), (C * S * S,)):
            raise ValueError(
                f"the images have shape {tuple(x.shape)} in place of (n, {C}, {S}, {S})"
            )
        side = S // p  # patches along a side
        x = x.reshape(B, C, side, p, side, p)
        x = x.permute(0, 2, 4, 1, 3, 5)  # (B, side, side, C, p, p)
        return x.reshape(B, side * side, C * p * p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(self.patches(x))  # (B, N_p, d)
        if self.config.pool == "cls":
            cls = self.cls.expand(len(h), 1, -1)
            h = torch.cat([cls, h], dim=1)  # (B, N_p + 1, d)
        h = h + self.pos
        for block in self.blocks:
            h = block(h)
        v = h[:, 0] if self.config.pool == "cls" else h.mean(1)  # (B, d)
        if self.config.norm == "pre":
            v = self.norm(v)
        return self.head(v)
