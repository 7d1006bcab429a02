"""One look for every figure: theme, a style for every role, and a byte-stable way to save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike
from torch import Tensor

from utils.run.files import atomic

# Name of a role -> how it is drawn, in every figure of the repository. One colour has one meaning;
# a figure asks for its roles by name, never by their order.
ROLES: dict[str, dict[str, Any]] = {
    "measured": {"color": "#0173B2", "linestyle": "-", "marker": "o", "markersize": 3.5},
    "bound": {"color": "#D55E00", "linestyle": "--"},
    "tighter": {"color": "#029E73", "linestyle": ":", "linewidth": 2.0},
    "reference": {"color": "0.6", "linestyle": "-", "linewidth": 0.8},
    "control": {"color": "0.45", "linestyle": "-.", "marker": "s", "markersize": 3.0},
    # the parts of a data set
    "training": {"color": "#56B4E9", "linestyle": "-"},
    "calibration": {"color": "#CC78BC", "linestyle": "-"},
    "held-out": {"color": "#8C613C", "linestyle": "-"},
    # the ladder of bounds on a Hessian norm, darker as it gets tighter
    "closed form": {"color": "#EE9B70", "linestyle": "--", "marker": "v", "markersize": 4.0},
    "activations": {"color": "#E66B5C", "linestyle": "--", "marker": "<", "markersize": 4.0},
    "tangents": {"color": "#C93D66", "linestyle": "--", "marker": ">", "markersize": 4.0},
    "majorant": {"color": "#8F2F6F", "linestyle": "--", "marker": "^", "markersize": 4.0},
    "certified": {"color": "#4B2362", "linestyle": "--", "marker": "D", "markersize": 3.5},
    "one step": {"color": "#DE8F05", "linestyle": "-.", "marker": "o", "markersize": 3.0},
}

THEME = {
    "figure.figsize": (7.0, 3.8),
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "legend.frameon": False,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "svg.hashsalt": "loss-surface",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}

# without the time and the version of matplotlib, which would change the bytes
METADATA = {"pdf": {"CreationDate": None}, "png": {"Software": None}}


def use_theme() -> None:
    """Set seaborn's notebook context on a white grid, in sizes that read at GitHub's column width.

    Tables show whole cells.

    >>> use_theme()
    >>> plt.rcParams["savefig.dpi"]
    150.0
    """
    pd.set_option("display.max_colwidth", None)
    sns.set_theme(context="notebook", style="ticks", rc=THEME)


def band(ax: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, role: str = "measured") -> None:
    """Shade the interval of a line in the colour of its role.

    ax    where to draw
    x     places (n,)
    low   lower ends (n,)
    high  upper ends (n,)
    role  a name in ROLES

    >>> ax = plt.figure().subplots()
    >>> band(ax, [1, 2], [0.9, 1.8], [1.1, 2.2], role="bound")
    >>> len(ax.collections)
    1
    """
    ax.fill_between(x, low, high, color=ROLES[role]["color"], alpha=0.18, linewidth=0)


def reference_slope(
    ax: Axes, x: ArrayLike, y0: float, slope: float, label: str | None = None
) -> None:
    """Draw a thin grey power law.

    ax     where to draw, with two logarithmic scales
    x      places (n,), positive
    y0     its value at x[0]
    slope  its exponent
    label  for the legend

    >>> ax = plt.figure().subplots()
    >>> reference_slope(ax, [2, 8], y0=5.0, slope=-1.0)
    >>> ax.lines[0].get_ydata().tolist()
    [5.0, 1.25]
    """
    x = np.asarray(x, dtype=float)
    ax.plot(x, y0 * (x / x[0]) ** slope, label=label, **ROLES["reference"])


def few_decades(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times the powers of ten.

    axis  the x or y axis of a plot

    >>> ax = plt.figure().subplots()
    >>> few_decades(ax.loglog([30, 600], [1, 1])[0].axes.xaxis)
    >>> ax.xaxis.get_major_formatter()(50.0)
    '50'
    """
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, study: str, name: str, data: pd.DataFrame) -> Path:
    """Write a figure and what is plotted in it; unchanged data give unchanged bytes.

    figure  what to save
    study   name of the study, a folder of figures/
    name    of the files, without an ending
    data    the numbers in the figure, one row a point

    Returns the path of figures/<study>/<name>.png; .pdf and .csv lie beside it.

    Raises OSError where the folder cannot be written; files that were there are kept whole.

    >>> import contextlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    ...     path = save_figure(plt.figure(), "demo", "empty", pd.DataFrame({"k": [1]}))
    ...     sorted(file.name for file in path.parent.iterdir())
    ['empty.csv', 'empty.pdf', 'empty.png']
    """
    folder = Path("figures") / study
    folder.mkdir(parents=True, exist_ok=True)
    for kind, metadata in METADATA.items():
        with atomic(folder / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata, bbox_inches="tight")
    with atomic(folder / f"{name}.csv") as temporary:
        data.to_csv(temporary, index=False)
    return folder / f"{name}.png"


def example_strip(parts: Mapping[str, tuple[Tensor, Tensor]], columns: int = 10) -> Figure:
    """Show the first examples of each part, a row a part, with their labels.

    parts    name of a part -> (x (n, ...), y (n,)). Images (n, 1 or 3, S, S') are shown as they
             are, other inputs as one line of values.
    columns  examples in a row

    >>> import torch
    >>> x = torch.zeros(3, 1, 4, 4)
    >>> figure = example_strip({"training": (x, torch.arange(3))}, columns=3)
    >>> [ax.get_title() for ax in figure.axes]
    ['0', '1', '2']
    """
    size = (0.85 * columns, 1.15 * len(parts))
    figure, axes = plt.subplots(len(parts), columns, figsize=size, squeeze=False)
    for row, (name, (x, y)) in zip(axes, parts.items(), strict=True):
        for ax, example, label in zip(row, x[:columns], y[:columns], strict=False):
            _draw_example(ax, example)
            ax.set_title(str(int(label)), fontsize=8, pad=2)
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        row[0].set_ylabel(name, fontsize=9)
    return figure


def show(figure: Figure) -> None:
    """Show a figure once, under the cell that made it.

    figure  what to show; it is closed afterwards

    >>> show(plt.figure())  # doctest: +SKIP
    """
    plt.show()
    plt.close(figure)


def _draw_example(ax: Axes, example: Tensor) -> None:
    is_image = example.ndim == 3 and example.shape[0] in (1, 3)
    if not is_image:
        values = example.reshape(-1).numpy()
        ax.plot(values, color=ROLES["measured"]["color"], linewidth=0.7)
        return
    picture = example.permute(1, 2, 0).double().numpy()  # (S, S', channels)
    low = picture.min()
    contrast = max(picture.max() - low, 1e-12)
    colours = "gray_r" if example.shape[0] == 1 else None
    ax.imshow((picture - low) / contrast, cmap=colours)
