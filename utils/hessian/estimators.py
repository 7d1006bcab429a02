"""Estimators of one norm beside each other, PyHessian as it comes among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from utils.hessian import pyhessian
from utils.hessian.losses import Losses
from utils.hessian.norms import hessian_norm, per_sample_hessian_norms
from utils.run.streams import numpy_generator


def compare_estimators(
    model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy", seed: int = 0
) -> pd.DataFrame:
    """The norm of the Hessian of the mean loss by five estimators, for a network that is small.

    model, x, y, loss  the network, inputs (k, ...), labels (k,) and the loss's name
    seed               of the random starts

    Columns: estimator (eigsh of the dense matrix, exact, lanczos, pyhessian behind our adapter,
    pyhessian alone at its defaults), value, residual, iterations, error relative to exact.

    >>> table = compare_estimators(nn.Linear(2, 3), np.ones((4, 2)), [0, 1, 2, 0])
    >>> list(table["estimator"][:3]), bool(table["error"][:3].abs().max() < 1e-6)
    (['eigsh', 'exact', 'lanczos'], True)
    """
    losses = Losses(model, x, y, loss)
    rows = [("eigsh", *_eigsh(losses.dense().cpu().numpy(), seed))]
    for name in ("exact", "lanczos", "pyhessian"):
        e = hessian_norm(model, x, y, loss, estimator=name, seed=seed)
        rows.append((name, e.value, e.residual, e.iterations))
    alone = pyhessian.eigenvalue(losses, **pyhessian.DEFAULTS, seed=seed)
    rows.append(("pyhessian alone", abs(alone.reported), alone.residual, alone.iterations))
    table = pd.DataFrame(rows, columns=["estimator", "value", "residual", "iterations"])
    exact = table.loc[table["estimator"] == "exact", "value"].item()
    return table.assign(error=table["value"] / exact - 1)


def _eigsh(matrix: np.ndarray, seed: int) -> tuple[float, float, int]:
    """Norm, residual and products of ARPACK on a dense matrix."""
    products = []

    def product(v: np.ndarray) -> np.ndarray:
        products.append(1)
        return matrix @ v

    start = numpy_generator("dense estimate", seed).normal(size=len(matrix))
    operator = LinearOperator(matrix.shape, product)
    (theta,), vectors = eigsh(operator, k=1, which="LM", v0=start)
    v = vectors[:, 0]
    residual = np.linalg.norm(matrix @ v - theta * v)
    return float(abs(theta)), float(residual), len(products)


def compare_on_examples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Norms of the examples' Hessians: ours, and PyHessian's alone at its defaults.

    model, x, y, loss  the network, inputs (n, ...), labels (n,) and the loss's name
    seed               of the random starts
    progress           called with 1 after each example

    Columns: index, estimator (lanczos, pyhessian alone), value, residual, iterations, error
    relative to lanczos, nan where both are 0.

    >>> table = compare_on_examples(nn.Linear(2, 3), np.ones((2, 2)), [0, 1])
    >>> list(table["estimator"])
    ['lanczos', 'pyhessian alone', 'lanczos', 'pyhessian alone']
    """
    ours = per_sample_hessian_norms(model, x, y, loss, seed=seed)
    rows = []
    for i in range(len(x)):
        one = Losses(model, x[i : i + 1], y[i : i + 1], loss)
        theirs = pyhessian.eigenvalue(one, **pyhessian.DEFAULTS, seed=seed)
        value, residual = ours.value[i].item(), ours.residual[i].item()
        rows.append((i, "lanczos", value, residual, int(ours.iterations[i])))
        reported = abs(theirs.reported)
        rows.append((i, "pyhessian alone", reported, theirs.residual, theirs.iterations))
        if progress is not None:
            progress(1)
    columns = ["index", "estimator", "value", "residual", "iterations"]
    table = pd.DataFrame(rows, columns=columns)
    exact = ours.value.numpy()[table["index"]]
    with np.errstate(invalid="ignore", divide="ignore"):
        return table.assign(error=table["value"].to_numpy() / exact - 1)
