"""One question about sample size, for who has only one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from utils.sample_size.answer import SampleSize
from utils.sample_size.measurement import CRITERIA, pilot

MEANT = {  # criterion -> which of the options it has
    "surface": ("ceiling", "radius"),
    "ball": ("rung", "remainder", "radius"),
    "excess": ("rung", "remainder", "gap", "radius"),
    "next": (),
    "step": ("rung", "radius"),
}


def required_samples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    tolerance: float,
    radius: float = 0.0,
    confidence: float = 0.95,
    criterion: str = "surface",
    fitted_on: Tensor | None = None,
    loss: str = "cross_entropy",
    *,
    kurtosis: float = 20.0,
    ceiling: float | None = None,
    n_probes: int = 8,
    seed: int = 0,
    rung: str | None = None,
    remainder: float = 0.0,
    gap: float = 0.0,
    **options: Any,
) -> SampleSize:
    """How many examples until more change the loss surface around the model by less than tau?

    One question of a `pilot`, for who has only one.

    model, x, y  as of `pilot`, and so are fitted_on, loss, kurtosis, n_probes, seed and options
    tolerance    tau > 0, in units of the loss
    radius       of the neighbourhood or the ball, Euclidean, absolute
    confidence   1 - delta
    criterion    "surface", "ball", "excess", "next" or "step", see the head of `measurement`
    ceiling      of `Pilot.surface`
    rung         of `Pilot.ball`, `Pilot.excess` and `Pilot.step`
    remainder    of `Pilot.ball` and `Pilot.excess`
    gap          of `Pilot.excess`

    Raises ValueError for an unknown criterion, for values out of range and for options that the
    criterion does not have.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(400, 2), torch.arange(400) % 3
    >>> print(required_samples(torch.nn.Linear(2, 3), x, y, tolerance=5.0).sentence[:6])
    enough
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: choose one of {', '.join(CRITERIA)}.")
    given = {"ceiling": ceiling, "rung": rung, "remainder": remainder, "gap": gap}
    for name, value in (given | {"radius": radius}).items():
        if value and name not in MEANT[criterion]:
            raise ValueError(f"{name} says nothing to the criterion {criterion!r}: leave it out.")
    measured = pilot(
        model,
        x,
        y,
        radius=radius,
        ball=radius,
        fitted_on=fitted_on,
        loss=loss,
        kurtosis=kurtosis,
        n_probes=n_probes,
        seed=seed,
        **options,
    )
    curved = {"rung": rung, "remainder": remainder}
    more: dict[str, dict] = {
        "surface": {"ceiling": ceiling},
        "ball": curved,
        "excess": curved | {"gap": gap},
        "step": {"radius": radius, "rung": rung},
    }
    return getattr(measured, criterion)(tolerance, confidence, **more.get(criterion, {}))
