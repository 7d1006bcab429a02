"""Losses at the weights that stand for a neighbourhood, and the most that any label would cost."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from utils.hessian import Losses
from utils.run.streams import generator


def neighbourhood(w: Tensor, radius: float, n_probes: int, seed: int = 0) -> Tensor:
    """Probe weights (n_probes, P), uniform in a ball; the centre itself, (1, P), at radius 0.

    w         centre (P,)
    radius    Euclidean
    n_probes  how many
    seed      of the draw. mu is the uniform distribution on these points: fixed before the examples
              are looked at, so that Theorem (thm:neighbourhood) holds for it exactly.

    >>> probes = neighbourhood(torch.zeros(3), radius=0.5, n_probes=4)
    >>> probes.shape, bool((probes.norm(dim=1) <= 0.5).all())
    (torch.Size([4, 3]), True)
    """
    if radius == 0:
        return w[None]
    stream = generator("ball probes", seed)
    directions = torch.randn(n_probes, len(w), generator=stream, dtype=torch.float64).to(w)
    uniform = torch.rand(n_probes, 1, generator=stream, dtype=torch.float64).to(w)
    lengths = radius * uniform ** (1 / len(w))
    return w + lengths * directions / directions.norm(dim=1, keepdim=True)


def probe_losses(losses: Losses, probes: Tensor) -> np.ndarray:
    """Losses (n_probes, n) of each example at each probe.

    losses  of n examples
    probes  weights (n_probes, P)

    One forward pass of all a probe.

    >>> losses = Losses(torch.nn.Linear(2, 3), torch.ones(5, 2), torch.arange(5) % 3)
    >>> probe_losses(losses, neighbourhood(losses.w, 0.1, 4)).shape
    (4, 5)
    """
    return np.stack([losses.values(w).double().cpu().numpy() for w in probes])


def label_ceiling(losses: Losses, probes: Tensor, n_classes: int) -> np.ndarray:
    """The largest loss (n,) that any of the labels would give each example at any of the probes.

    losses     of n examples
    probes     weights (n_probes, P)
    n_classes  labels are 0 to n_classes - 1

    Its maximum over a pilot is a `ceiling` for every labelling of inputs like the pilot's, wrong
    labels included: an assumption on the inputs alone. For all inputs there is
    `bounds.loss_upper_bound`, which is larger.

    >>> losses = Losses(torch.nn.Linear(2, 3), torch.ones(5, 2), torch.arange(5) % 3)
    >>> bool((label_ceiling(losses, losses.w[None], 3) >= losses.values().numpy()).all())
    True
    """
    largest = []
    for label in range(n_classes):
        relabelled = copy.copy(losses)
        relabelled.y = torch.full_like(losses.y, label)
        largest.append(probe_losses(relabelled, probes).max(0))
    return np.max(largest, 0)
