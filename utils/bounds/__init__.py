"""Rigorous upper bounds of the spectral norm of every example's Hessian: a ladder of five rungs.

`ladder` the face · `walk` prior and activations · `tangents`, `majorant` at one point ·
`closed_form` one formula for a pre-norm ViT · `published` two printed constants, not bounds ·
`compare`, `pictures` what notebook 04 measures and draws
"""

from utils.bounds.closed_form import loss_upper_bound
from utils.bounds.ladder import RUNGS, Bound, hessian_bounds
from utils.bounds.published import closing_the_curvature_gap, unraveling_the_hessian
from utils.bounds.subject import group_of
from utils.bounds.walk import SLOPES, Measured, measured_norms

__all__ = [
    "RUNGS",
    "SLOPES",
    "Bound",
    "Measured",
    "closing_the_curvature_gap",
    "group_of",
    "hessian_bounds",
    "loss_upper_bound",
    "measured_norms",
    "unraveling_the_hessian",
]
