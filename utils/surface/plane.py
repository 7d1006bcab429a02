"""The loss surface over a plane, flat and in three dimensions, for growing samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from utils.hessian import Losses

DECADES = 5  # shown below the largest value of a logarithmic row


def plane_losses(
    losses: Losses, axes: Tensor, extent: float, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of every example on a plane through the weights.

    losses  of n examples, as a function of the P weights
    axes    (2, P) of unit length
    extent  of the plane to each side [units of weight]
    points  on each side [1]

    Returns coordinates (points,) and losses (points, points, n) at w0 + s axes[0] + t axes[1]: the
    first index is t, the second s, as a picture has rows and columns.

    >>> import torch
    >>> losses = Losses(torch.nn.Linear(2, 2), torch.eye(2), torch.tensor([0, 1]))
    >>> plane_losses(losses, torch.eye(6, dtype=torch.float64)[:2], 1.0, 3)[1].shape
    (3, 3, 2)
    """
    at = np.linspace(-extent, extent, points)

    def values(s: float, t: float) -> np.ndarray:
        return losses.values(losses.w + s * axes[0] + t * axes[1]).double().cpu().numpy()

    return at, np.array([[values(s, t) for s in at] for t in at])


class Row(NamedTuple):
    """A row of pictures with one colour scale.

    label   of the scale, with its unit
    fields  (K, points, points), a picture each, as `plane_losses` has rows, columns
    log     whether the scale is logarithmic
    """

    label: str
    fields: np.ndarray
    log: bool

    @property
    def ends(self) -> tuple[float, float]:
        """Of the colour scale."""
        high = self.fields.max()
        low = self.fields.min()
        return (max(low, high * 10.0**-DECADES) if self.log else low), high


def plane_rows(plane: np.ndarray, order: np.ndarray, sizes: Sequence[int]) -> list[Row]:
    """L_k and |L_{k+1} - L_k| over a plane.

    plane  (points, points, n) losses [nat]
    order  (n,) integers
    sizes  the k, below n [examples]

    >>> plane_rows(np.ones((3, 3, 4)), np.arange(4), [1, 2])[0].fields.shape
    (2, 3, 3)
    """
    means = np.cumsum(plane[..., order], axis=-1) / np.arange(1, len(order) + 1)
    steps = np.abs(np.diff(means, axis=-1)).clip(min=1e-12)
    at = np.asarray(sizes) - 1
    shown = (np.moveaxis(field[..., at], -1, 0) for field in (means, steps))
    values, changes = shown
    return [
        Row("$L_k$ [nat]", values, False),
        Row("$|L_{k+1} - L_k|$ [nat]", changes, True),
    ]


def contours(at: np.ndarray, rows: Sequence[Row], titles: Sequence[str]) -> Figure:
    """Rows of pictures as filled contours.

    at      (points,) coordinates on both axes [units of weight]
    rows    the pictures
    titles  (K,) of the columns

    >>> rows = plane_rows(np.random.default_rng(0).random((3, 3, 4)), np.arange(4), [1, 2])
    >>> plt.close(contours(np.array([-1.0, 0.0, 1.0]), rows, ["k = 1", "k = 2"]))
    """
    shape = len(rows), len(titles)
    figure, axes = plt.subplots(*shape, figsize=(9.4, 5.8), sharex=True, sharey=True)
    for line, row in zip(axes, rows, strict=True):
        levels = (np.geomspace if row.log else np.linspace)(*row.ends, 13)
        norm = LogNorm(*row.ends) if row.log else None
        for ax, title, field in zip(line, titles, row.fields, strict=True):
            drawn = ax.contourf(at, at, field.clip(*row.ends), levels, norm=norm, cmap="viridis")
            ax.plot(0, 0, "+", color="white")
            ax.set_title(title)
            ax.grid(False)
        figure.colorbar(drawn, ax=line, label=row.label, format="%.2g")
    figure.supxlabel("along the first eigenvector [units of weight]")
    figure.supylabel("along the second [units of weight]")
    return figure


def surfaces(at: np.ndarray, rows: Sequence[Row], titles: Sequence[str]) -> Figure:
    """Rows of pictures in three dimensions, heights in the units of the colour bar.

    at      (points,) coordinates on both axes [units of weight]
    rows    the pictures; a logarithmic row is shown as powers of ten
    titles  (K,) of the columns

    >>> rows = plane_rows(np.random.default_rng(0).random((3, 3, 4)), np.arange(4), [1, 2])
    >>> plt.close(surfaces(np.array([-1.0, 0.0, 1.0]), rows, ["k = 1", "k = 2"]))
    """
    shape = {"nrows": len(rows), "ncols": len(titles)}
    figure = plt.figure(figsize=(9.2, 6.2), dpi=75, layout="constrained")
    axes = figure.subplots(**shape, subplot_kw={"projection": "3d"})
    grid: tuple = np.meshgrid(at, at)
    ticks = [round(float(at[0]), 2), 0, round(float(at[-1]), 2)]
    for line, row in zip(axes, rows, strict=True):
        low, high = np.log10(row.ends) if row.log else row.ends
        look = {"cmap": "viridis", "vmin": low, "vmax": high, "linewidth": 0, "antialiased": False}
        for ax, title, field in zip(line, titles, row.fields, strict=True):
            height = np.log10(field) if row.log else field
            drawn = ax.plot_surface(*grid, height.clip(low, high), **look)
            ax.set(zlim=(low, high), title=title, xticks=ticks, yticks=ticks)
            ax.tick_params(labelsize=7, pad=0)
            ax.set_xlabel("first [w]", fontsize=8)
            ax.set_ylabel("second [w]", fontsize=8)
        label = f"log10 {row.label}" if row.log else row.label
        figure.colorbar(drawn, ax=list(line), shrink=0.7, pad=0.08, label=label)
    return figure
