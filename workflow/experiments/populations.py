"""Populations whose true sample size is known: data, networks, and how often a rule is right."""

from __future__ import annotations

import math

import numpy as np
import torch

from utils.data import load_dataset, synthetic_draw
from utils.networks import build_model
from utils.report.over_runs import share_interval

CONFIDENCE = 0.9
PILOT, LARGER = 400, 1600  # samples of a pilot
MOST = 200_000  # samples of one training
TRUTH = ("truth", "truth_low", "truth_high")


def dataset_of(name: str):
    """(x, y) to train on, (x, y) of the pool, for a data set by name."""
    if name == "synthetic":
        return synthetic_draw(600, 1), synthetic_draw(20000, 2)
    found = load_dataset(name, n_samples=6000 if name == "mnist" else 0)
    rest = (
        (found.x_calibration, found.y_calibration)
        if name == "digits"
        else (found.x_test[:0], found.y_test[:0])
    )
    return (found.x_train, found.y_train), (
        torch.cat([rest[0], found.x_test]),
        torch.cat([rest[1], found.y_test]),
    )


def network(kind: str, x, n_classes: int, seed: int, width: int = 16):
    torch.manual_seed(seed)
    if kind == "mlp":
        return build_model("mlp", d_in=x[0].numel(), width=width, depth=1, n_classes=n_classes)
    size = x.shape[-1]
    sizes = dict(
        image_size=size,
        channels=x.shape[1],
        patch_size=size // (2 if size % 4 else 4),
        n_classes=n_classes,
    )
    return build_model("vit", **sizes, depth=1, n_heads=2, d_model=width, d_ff=2 * width)


def interval_row(rule: str, low, high, truth, promised: float | None = None) -> dict:
    """How often [low, high] holds the truth where high is finite, with its exact interval, and how
    far off high is.

    truth: (k, its own interval's ends) or one such row a pilot; the whole interval has to be held.
    low None: the rule gives one number, and covers where that is at least the truth's k."""
    high = np.asarray(high, float)
    high = np.where(np.isfinite(high) & (high > 0), high, math.inf)
    k, least, most = np.broadcast_to(np.asarray(truth, float), (len(high), 3)).T
    held, told = (
        (k <= high) if low is None else (np.asarray(low, float) <= least) & (most <= high),
        np.isfinite(high),
    )
    hits, off = int(held[told].sum()), np.log10(high[told]) - np.log10(k[told])
    share_low, share_high = (
        share_interval(hits, int(told.sum())) if told.any() else (math.nan, math.nan)
    )
    row = {
        "rule": rule,
        "pilots": len(high),
        "refused": int((~told).sum()),
        "covered": hits / max(1, told.sum()),
    }
    row |= {"covered_low": share_low, "covered_high": share_high, "promised": promised}
    row |= {"ratio_median": 10 ** np.median(off) if told.any() else math.nan}
    return row | {"error_log10": math.sqrt((off**2).mean()) if told.any() else math.nan}
