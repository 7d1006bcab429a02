"""The old place of `utils.networks`: names only."""

from torch.nn import LayerNorm

from utils.networks.build import build_for_data, build_model
from utils.networks.contract import (
    prepared_copy,
    refuse_random_or_batch_dependent,
    second_order_mode,
)
from utils.networks.losses import LOSSES, logits, loss_from_logits
from utils.networks.mlp import MLP, MLPConfig
from utils.networks.restore import describe, load_state, read_weights, restore
from utils.networks.sizes import ACTIVATIONS
from utils.networks.vit import Attention, Block, MultilayerPerceptron, ViT, ViTConfig

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "MLP",
    "Attention",
    "Block",
    "LayerNorm",
    "MLPConfig",
    "MultilayerPerceptron",
    "ViT",
    "ViTConfig",
    "build_for_data",
    "build_model",
    "describe",
    "load_state",
    "logits",
    "loss_from_logits",
    "prepared_copy",
    "read_weights",
    "refuse_random_or_batch_dependent",
    "restore",
    "second_order_mode",
]
