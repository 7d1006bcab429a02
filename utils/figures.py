"""One look for every figure: theme, fixed roles, and a byte-stable way to save."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from utils.runs import atomic

# a role keeps its colour, line and marker in every figure of the repository
ROLES = {
    "measured": {"color": "#0173B2", "linestyle": "-", "marker": "o", "markersize": 3.5},
    "bound": {"color": "#D55E00", "linestyle": "--"},
    "tighter": {"color": "#029E73", "linestyle": ":", "linewidth": 2.0},
    "reference": {"color": "0.6", "linestyle": "-", "linewidth": 0.8},
    "control": {"color": "0.45", "linestyle": "-.", "marker": "s", "markersize": 3.0},
}


def use_theme() -> None:
    """seaborn's notebook context on a white grid, sizes that read at GitHub's column width; tables show whole cells."""
    pd.set_option("display.max_colwidth", None)
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
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
        },
    )


def band(ax, x, low, high, role: str = "measured") -> None:
    """The interval of a line, in the colour of its role."""
    ax.fill_between(x, low, high, color=ROLES[role]["color"], alpha=0.18, linewidth=0)


def reference_slope(ax, x, y0: float, slope: float, label: str | None = None) -> None:
    """A thin grey power law through (x[0], y0)."""
    x = pd.Series(x, dtype=float).to_numpy()
    ax.plot(x, y0 * (x / x[0]) ** slope, label=label, **ROLES["reference"])


def save_figure(figure, study: str, name: str, data: pd.DataFrame) -> Path:
    """Write figures/<study>/<name>.pdf, .png and .csv (what is plotted); unchanged data give unchanged bytes."""
    folder = Path("figures") / study
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        with atomic(folder / f"{name}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata, bbox_inches="tight")
    with atomic(folder / f"{name}.csv") as temporary:
        data.to_csv(temporary, index=False)
    return folder / f"{name}.png"


def sample_strip(parts: dict, columns: int = 10):
    """The first samples of each part, a row a part: `parts` maps its name to (x (n, ...), y (n,)).

    Images (n, 1 or 3, S, S') are shown as they are, other inputs as one line of values.
    """
    figure, axes = plt.subplots(len(parts), columns, figsize=(0.85 * columns, 1.15 * len(parts)), squeeze=False)
    for row, (name, (x, y)) in zip(axes, parts.items(), strict=True):
        for ax, sample, label in zip(row, x[:columns], y[:columns], strict=False):
            if sample.ndim == 3 and sample.shape[0] in (1, 3):
                picture = sample.permute(1, 2, 0).double().numpy()
                low, high = picture.min(), picture.max()
                ax.imshow((picture - low) / max(high - low, 1e-12), cmap="gray_r" if sample.shape[0] == 1 else None)
            else:
                ax.plot(sample.reshape(-1).numpy(), color=ROLES["measured"]["color"], linewidth=0.7)
            ax.set_title(str(int(label)), fontsize=8, pad=2)
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        row[0].set_ylabel(name, fontsize=9)
    return figure


def show(figure) -> None:
    """Show a figure once, under the cell that made it."""
    plt.show()
    plt.close(figure)
