"""Pictures of notebook 03: norms of examples, of means, of blocks, and the spectrum."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from utils.figures import ROLES, band, few_decades

NAMES = {"H_k": "$H_k$", "H_k - H_n": "$H_k - H_n$", "H_k+1 - H_k": "$H_{k+1} - H_k$"}


def picture_of_examples(table: pd.DataFrame) -> Figure:
    """Histogram of the examples' norms, and norm against loss.

    table  columns part, value (norm) and loss

    >>> table = pd.DataFrame({"part": "training", "value": [1.0, 2.0], "loss": [0.1, 0.2]})
    >>> plt.close(picture_of_examples(table))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    decades = np.log10(table["value"].clip(lower=1e-12))
    edges = np.linspace(decades.min(), decades.max(), 28)
    for part, group in table.groupby("part", sort=False):
        label = f"{part} (n = {len(group)})"
        line = {"histtype": "step", "linewidth": 1.6, "color": ROLES[part]["color"]}
        left.hist(decades[group.index], bins=edges, label=label, **line)
        points = {"color": ROLES[part]["color"], "markersize": 4, "alpha": 0.7, "label": part}
        right.loglog(group["loss"], group["value"], ".", **points)
    left.set(xlabel="log10 of the norm of a sample's Hessian [nat/w²]", ylabel="samples")
    right.set(xlabel="loss of the sample [nat]", ylabel="norm of its Hessian [nat/w²]")
    left.set_title("Per-sample Hessian norms")
    right.set_title("Curvature against loss")
    left.legend(loc="upper right", fontsize=8)
    right.legend(fontsize=8)
    return figure


def picture_of_pyhessian(table: pd.DataFrame) -> Figure:
    """Error of PyHessian's values against the residual of its vectors.

    table  of `compare_on_examples`, with a column matrix

    >>> row = {"estimator": "pyhessian alone", "matrix": "H", "value": 1.0, "residual": 0.1}
    >>> plt.close(picture_of_pyhessian(pd.DataFrame([row | {"error": 1e-3}])))
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    theirs = table[table["estimator"] == "pyhessian alone"]
    for (matrix, t), role in zip(theirs.groupby("matrix", sort=False), ("control", "measured")):
        style = ROLES[role] | {"linestyle": "", "marker": "o"}
        error = t["error"].abs().clip(lower=1e-9)
        ax.loglog(t["residual"] / t["value"], error, label=f"{matrix} (n = {len(t)})", **style)
    ax.axhline(1e-3, **ROLES["reference"])
    ax.set_xlabel("relative residual of PyHessian's vector")
    ax.set_ylabel("relative error of its value")
    ax.set_title("PyHessian alone at its defaults (grey: 1e-3, the tolerance it is given)")
    ax.legend()
    return figure


def picture_of_differences(norms: pd.DataFrame, n: int, M: float, label: str) -> Figure:
    """Norms of H_k, H_k - H_n and H_{k+1} - H_k against k, the band being their range.

    norms  columns matrix, k, value, one row an order of the examples
    n      examples of the limit
    M      the constant of 2 M / (k + 1), the papers' bound of the step
    label  what M is taken over

    >>> matrices = ("H_k", "H_k - H_n", "H_k+1 - H_k")
    >>> columns = {"k": [1, 2], "value": [2.0, 1.0]}
    >>> norms = pd.concat(pd.DataFrame(columns | {"matrix": m}) for m in matrices)
    >>> plt.close(picture_of_differences(norms, n=4, M=2.0, label="the training part"))
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.7))
    roles = {"H_k": "control", "H_k - H_n": "measured", "H_k+1 - H_k": "tighter"}
    for matrix, role in roles.items():
        by_size = norms[norms["matrix"] == matrix].groupby("k")["value"]
        rms = by_size.apply(lambda v: np.sqrt((v**2).mean()))
        ax = right if matrix == "H_k+1 - H_k" else left
        ax.loglog(rms.index, rms, label=NAMES[matrix], **ROLES[role])
        band(ax, rms.index, by_size.min(), by_size.max(), role)
    k = np.array(rms.index, dtype=float)
    right.plot(k, 2 * M / (k + 1), label=f"$2M/(k+1)$, $M$ of {label}", **ROLES["bound"])
    shape = np.sqrt(1 / k - 1 / n)
    distances = norms.loc[norms["matrix"] == "H_k - H_n", "value"]
    level = np.sqrt((distances**2).mean() / (shape**2).mean())
    left.plot(k, level * shape, label=r"proportional to $\sqrt{1/k - 1/n}$", **ROLES["reference"])
    left.set(xlabel="k [samples]", ylabel="spectral norm [nat/w²]")
    right.set(xlabel="k [samples]", ylabel="spectral norm [nat/w²]")
    left.set_title(f"$H_k$ and its distance to $H_n$ (n = {n})")
    right.set_title(f"One step (band: range over {by_size.size().max()} orders)")
    for ax in (left, right):
        few_decades(ax.xaxis)
        ax.legend(fontsize=8)
    return figure


def picture_of_blocks(blocks: dict[str, pd.DataFrame], k: int) -> Figure:
    """Maps of the decimal logarithm of block norms on one scale; a block that is zero is blank.

    blocks  label -> norms by row and column
    k       examples of the mean

    >>> block = pd.DataFrame([[1.0, 0.1], [0.1, 1.0]])
    >>> plt.close(picture_of_blocks({"untrained": block, "trained": block}, k=4))
    """
    logs = {label: np.log10(b.where(b > 1e-12 * b.to_numpy().max())) for label, b in blocks.items()}
    everything = np.concatenate([v.to_numpy().ravel() for v in logs.values()])
    scale = {"cmap": "viridis", "vmin": np.nanmin(everything), "vmax": np.nanmax(everything)}
    bar = {"label": "log10 of the block's spectral norm", "shrink": 0.8}
    figure, axes = plt.subplots(1, len(logs), figsize=(11.5, 5.2))
    for ax, (label, values) in zip(axes, logs.items()):
        with_bar = {"cbar": ax is axes[-1], "cbar_kws": bar}
        ticks = {"xticklabels": 1, "yticklabels": 1}
        sns.heatmap(values, ax=ax, square=True, **scale, **with_bar, **ticks)
        ax.set(title=f"{label} (k = {k} samples)", xlabel="", ylabel="")
        ax.tick_params(labelsize=8)
    return figure


def picture_of_spectrum(counts: pd.DataFrame, P: int) -> Figure:
    """Counts of eigenvalues above a threshold, and of those below its negative.

    counts  of `SpectralDensity.rows`, with columns probes, steps, k
    P       eigenvalues there are

    >>> columns = {"threshold": [0.1, 1.0], "count": [3, 1], "low": [2, 0], "high": [4, 2]}
    >>> columns |= {"probes": 2, "steps": 5, "k": 10}
    >>> counts = pd.concat(pd.DataFrame(columns | {"sign": sign}) for sign in (1, -1))
    >>> plt.close(picture_of_spectrum(counts, P=9))
    """
    figure, ax = plt.subplots(figsize=(6.6, 3.7))
    for sign, role, label in ((1, "measured", "above t"), (-1, "bound", "below -t")):
        c = counts[counts["sign"] == sign]
        t, count = c["threshold"], c["count"].clip(lower=1e-3)
        ax.loglog(t, count, label=f"eigenvalues {label}", **ROLES[role])
        band(ax, t, c["low"].clip(lower=1e-3), c["high"], role)
    probes, steps, k = counts.iloc[0][["probes", "steps", "k"]].astype(int)
    ax.axhline(1, **ROLES["reference"])
    ax.set(xlabel="threshold t [nat/w²]", ylabel=f"eigenvalues out of {P}")
    ax.set_ylim(0.3, 3 * counts["count"].max())
    ax.set_title(f"Spectrum of $H_k$, k = {k} ({probes} starts, {steps} steps; band 95 %)")
    ax.legend()
    return figure
