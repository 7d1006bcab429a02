"""The loss of one example: what every quantity of the study is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

LOSSES = ("cross_entropy", "mse", "bce")
IGNORED = -100  # the label of a token that does not count, as in torch


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The `model`'s output (n, K) for inputs `x` (n, ...): a tensor, or the `logits` in an object
    or a dictionary.

    >>> logits(nn.Linear(2, 3), torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """
    return logits_of(model(x))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns. Raises ValueError where there are none.

    >>> logits_of({"logits": torch.zeros(5, 3)}).shape
    torch.Size([5, 3])
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"The model returns a {type(output).__name__}: return the logits alone, or an object "
            "or a dictionary with logits."
        )
    return found


def check_loss(loss: str) -> None:
    """Raise ValueError unless `loss` is one of `LOSSES`.

    >>> check_loss("mse")
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")


def loss_from_logits(f: Tensor, y: Tensor, loss: str = "cross_entropy") -> Tensor:
    """Loss (n,) of each example, from its logits and labels.

    f     logits (n, K), or (n, T, K) for T tokens
    y     labels (n,) or (n, T); a token with the label -100 does not count. For "mse" also
          targets of the shape of f
    loss  "cross_entropy" [nat], the mean over an example's tokens; "mse", the mean square of
          f - one-hot(y), or of f - y; or "bce" [nat], of one logit (n, 1) for the class 1 of two

    Raises ValueError for another loss.

    >>> loss_from_logits(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.6931])
    """
    check_loss(loss)
    if loss == "cross_entropy":
        of_label = f.gather(-1, y.clamp_min(0)[..., None])[..., 0]
        loss_of_token = f.logsumexp(-1) - of_label
        if y.ndim == 1:
            return loss_of_token
        counts = y != IGNORED
        return (counts * loss_of_token).sum(1) / counts.sum(1).clamp_min(1)
    if loss == "bce":
        return (softplus(f[:, 0]) - y * f[:, 0]).to(f)
    if not y.is_floating_point():
        y = (y[..., None] == torch.arange(f.shape[-1], device=f.device)).to(f.dtype)
    return (f - y.reshape(f.shape)).square().flatten(1).mean(1)
