"""The loss of one example: what every quantity of the study is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOSSES = ("cross_entropy", "mse")


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The `model`'s output (n, K) for inputs `x` (n, ...): a tensor, or an object's `.logits`.

    >>> logits(nn.Linear(2, 3), torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def check_loss(loss: str) -> None:
    """Raise ValueError unless `loss` is one of `LOSSES`.

    >>> check_loss("mse")
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")


def loss_from_logits(f: Tensor, y: Tensor, loss: str = "cross_entropy") -> Tensor:
    """Loss (n,) of each example, from the logits `f` (n, K) and the labels `y` (n,).

    loss  "cross_entropy" [nat], or "mse", the mean square over classes of f - one-hot(y)
    Raises ValueError for another loss.

    >>> loss_from_logits(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.6931])
    """
    check_loss(loss)
    if loss == "cross_entropy":
        of_label = f.gather(-1, y[..., None])[..., 0]
        return f.logsumexp(-1) - of_label
    classes = torch.arange(f.shape[-1], device=f.device)
    one_hot = (y[..., None] == classes).to(f.dtype)
    return (f - one_hot).square().mean(-1)
