"""Labels against a network's output: right, or one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.networks.losses import IGNORED


def as_tensor(values: Any, name: str) -> Tensor:
    """An array of numbers of torch, numpy or lists as a tensor.

    values  of any shape
    name    for messages

    Raises ValueError where the values are no array of numbers.

    >>> as_tensor([[1.0, 2.0]], "x").shape
    torch.Size([1, 2])
    """
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array: take out what is masked, or fill it.")
    if isinstance(values, np.ndarray):
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        kind = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"{name} is no array of numbers ({kind}): give a tensor.") from None
    if found.layout != torch.strided or found.is_quantized:
        raise ValueError(f"{name} is sparse or quantised: give a dense tensor.")
    return found


def fitting_labels(y: Tensor, shape: tuple[int, ...], loss: str) -> Tensor:
    """Labels or targets for outputs of the `shape` (n, K), or (n, T, K) for T tokens.

    y     "cross_entropy": integers (n,) or (n, T), classes from 0 to K - 1, -100 for a token that
          does not count. "mse": real targets of the output's shape, or integer classes, which stand
          for one-hot targets. "bce": one class 0 or 1 for each output (n, 1)
    loss  its name

    Returns int64 for classes, the same floating-point targets otherwise.

    Raises ValueError where they do not fit.

    >>> fitting_labels(torch.tensor([0, 2], dtype=torch.uint8), (2, 3), "cross_entropy")
    tensor([0, 2])
    """
    if loss == "mse" and y.is_floating_point():
        return _targets(y, shape)
    if loss == "bce":
        if shape[1:] != (1,):
            raise ValueError(
                f"bce is for one logit an example and the model returns {shape[1:]}: "
                "take cross_entropy, or return (n, 1)."
            )
        classes, wanted = 2, shape[:1]
        y = y[:, 0] if y.shape == shape else y
    else:
        classes, wanted = shape[-1], shape[:-1]
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"The labels have type {y.dtype}: give integer classes from 0 to {classes - 1}."
        )
    if y.shape != wanted:
        raise ValueError(
            f"The labels have shape {tuple(y.shape)} and the outputs {shape}: "
            f"give integer classes of shape {tuple(wanted)}."
        )
    if loss == "mse" and classes == 1:
        raise ValueError("One output has no one-hot targets: give real targets (n, 1), or bce.")
    y = y.long()
    counted = y[y != IGNORED] if y.ndim > 1 and loss == "cross_entropy" else y
    if counted.numel() == 0:
        raise ValueError("Every token is ignored (-100): give classes for some.")
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"The labels go from {low} to {high} and the model has {classes} classes: "
            f"number them from 0 to {classes - 1}."
        )
    return y


def _targets(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    if y.shape != shape:
        raise ValueError(
            f"The targets have shape {tuple(y.shape)} and the outputs {shape}: "
            "give one target for each number of the output."
        )
    bad = (~y.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(f"The target of example {int(bad[0])} is NaN or infinite: remove it.")
    return y
