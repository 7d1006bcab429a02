"""The networks of notebook 02: two of our own, or a user's, built, described and restored.

`vit`, `mlp`: the networks. `build`: from a specification. `restore`: from what a run has written.
`losses`: of one example. `contract`: the gate, what a model and its examples have to satisfy;
`copies`, `labels`: parts of it. `memory`: what an example takes. `training` uses the Hessian
package and is imported as `utils.networks.training`.
"""

from utils.networks.build import build_for_data, build_model
from utils.networks.mlp import MLP
from utils.networks.restore import describe, load_state, read_weights, restore, untrained
from utils.networks.vit import ViT, ViTConfig

__all__ = [
    "MLP",
    "ViT",
    "ViTConfig",
    "build_for_data",
    "build_model",
    "describe",
    "load_state",
    "read_weights",
    "restore",
    "untrained",
]
