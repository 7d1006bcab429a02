"""A second derivative of torch that is silently wrong, beside two that are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.hessian.derivatives import dense_hessian
from utils.hessian.losses import Losses

WAYS = {
    "torch.func.hessian": lambda f, w: torch.func.hessian(f)(w),
    "jacfwd(grad)": lambda f, w: torch.func.jacfwd(torch.func.grad(f))(w),
    "double backward": torch.autograd.functional.hessian,
}


def layer_norm_pitfall(model: nn.Module, x: Tensor, y: Tensor) -> pd.DataFrame:
    """Three ways to the Hessian of the mean cross-entropy, through two ways to write LayerNorm.

    model  a small network in float64 with modules called LayerNorm
    x, y   inputs (k, ...) and labels (k,)

    Columns: LayerNorm ("primitive operations", "F.layer_norm"), derivative, asymmetry |H - H^T| and
    distance to ours |H - exact|, both in Frobenius norm and relative to |exact|.
    `torch.func.hessian` is jacfwd(jacrev), and forward mode over a backward pass that runs under
    vmap loses terms of `F.layer_norm`.

    >>> from utils.networks import build_model
    >>> sizes = dict(image_size=2, channels=1, patch_size=1, n_classes=2, depth=1)
    >>> model = build_model("vit", **sizes, n_heads=1, d_model=2, d_ff=2).double()
    >>> table = layer_norm_pitfall(model, torch.ones(1, 1, 2, 2).double(), torch.tensor([0]))
    >>> len(table), bool(table["asymmetry"].drop(3).max() < 1e-9)  # row 3 is the wrong one
    (6, True)
    """
    losses = Losses(model, x, y)
    exact = dense_hessian(model, x, y)
    rows = []
    for label, norm in (("primitive operations", _primitive), ("F.layer_norm", _fused)):
        module = _with_layer_norm(model, norm)

        def value(w: Tensor, module: nn.Module = module) -> Tensor:
            f = torch.func.functional_call(module, losses.unflatten(w), (x,))
            return F.cross_entropy(f, y)

        for name, way in WAYS.items():
            H = way(value, losses.w).detach()
            asymmetry = ((H - H.T).norm() / exact.norm()).item()
            distance = ((H - exact).norm() / exact.norm()).item()
            rows.append((label, name, asymmetry, distance))
    columns = ["LayerNorm", "derivative", "asymmetry", "distance to exact"]
    return pd.DataFrame(rows, columns=columns)


def _primitive(self: nn.LayerNorm, z: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    rho = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
    return centred / rho * self.weight + self.bias


def _fused(self: nn.LayerNorm, z: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], self.weight, self.bias, self.eps)


def _with_layer_norm(model: nn.Module, forward: Callable) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module).__name__ == "LayerNorm":
            module.forward = MethodType(forward, module)
    return twin
