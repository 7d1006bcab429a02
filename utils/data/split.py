"""The split of a pool of examples into train, calibration and held-out parts, stratified by class.

All draws come from one `numpy.random.RandomState(seed)`, the generator that scikit-learn's
stratified split takes: first the subset, then the held-out part, then the calibration part.
"""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

PARTS = ("train", "calibration", "test")
SMALLEST_CLASS = 3  # examples: one for each part

Rows = np.ndarray  # row numbers, int64


def split_pool(
    y: np.ndarray,
    n_samples: int,
    calibration_fraction: float,
    test_fraction: float | None,
    order: str,
    random: np.random.RandomState,
) -> dict[str, Rows]:
    """Choose `n_samples` examples of a pool, then split them.

    y                     labels (n,) of the pool, integers 0..K-1
    n_samples             size of what is split, 0 for the whole pool [examples]. With `order`
                          "published" what is held out comes after these.
    calibration_fraction  share that calibrates [1]
    test_fraction         share that is held out [1]; None where there is a test set elsewhere
    order                 "random", or "published" to draw nothing
    random                the source of all draws

    Returns row numbers into `y` of the parts train, calibration and test, disjoint, each in random
    order.

    Raises ValueError where the pool is too small for what is asked.

    >>> y = np.arange(40) % 2
    >>> parts = split_pool(y, 20, 0.2, 0.2, "random", np.random.RandomState(0))
    >>> {part: len(rows) for part, rows in parts.items()}
    {'train': 12, 'calibration': 4, 'test': 4}
    """
    kept = np.arange(len(y))
    if n_samples and order == "published":
        held_out = round((test_fraction or 0) * n_samples)
        kept = kept[: n_samples + held_out]
        if len(kept) < n_samples + held_out:
            raise ValueError(
                f"n_samples is {n_samples} with {held_out} held out after them: choose at most "
                f"{len(y)} together."
            )
        if held_out:
            calibration_fraction = calibration_fraction * n_samples / len(kept)
            test_fraction = held_out / len(kept)
    elif n_samples:
        kept = _stratified_subset(y, n_samples, random)
    parts = split_rows(y[kept], calibration_fraction, test_fraction, random, order)
    return {part: kept[rows] for part, rows in zip(PARTS, parts)}


def split_rows(
    y: np.ndarray,
    calibration_fraction: float,
    test_fraction: float | None,
    random: np.random.RandomState,
    order: str = "random",
) -> tuple[Rows, Rows, Rows]:
    """Disjoint row numbers (train, calibration, held out), together all of 0..n-1.

    y                     labels (n,)
    calibration_fraction  share that calibrates; n times it is rounded [1]
    test_fraction         share that is held out [1]; None for nobody
    random                the source of all draws
    order                 "random" draws parts stratified by y; with "published" the parts follow
                          each other, and only the order inside each is random

    Raises ValueError where a part would be smaller than the number of classes, and where the
    held-out part would leave a class fewer than two examples.

    >>> y = np.repeat([0, 1], 10)
    >>> parts = split_rows(y, 0.2, 0.2, np.random.RandomState(0))
    >>> [np.bincount(y[part]).tolist() for part in parts]
    [[6, 6], [2, 2], [2, 2]]
    """
    n_test = round((test_fraction or 0) * len(y))
    n_calibration = round(calibration_fraction * len(y))
    n_train = len(y) - n_test - n_calibration
    sizes = {"calibration": n_calibration, "test": n_test, "train": n_train}
    n_classes = len(np.unique(y))
    for part, size in sizes.items():
        if size < n_classes and (part, test_fraction) != ("test", None):
            raise ValueError(
                f"The {part} part would have {size} of {len(y)} examples, fewer than the "
                f"{n_classes} classes: change calibration_fraction or test_fraction, or use more "
                "examples."
            )
    rows = np.arange(len(y))
    if order == "published":
        parts = np.split(rows, [n_train, n_train + n_calibration])
        return tuple(random.permutation(part) for part in parts)
    test = rows[:0]
    if n_test:
        rows, test = train_test_split(rows, test_size=n_test, stratify=y, random_state=random)
        left = np.bincount(y[rows], minlength=int(y.max()) + 1)
        rarest = min(set(y.tolist()), key=lambda c: left[c])
        if left[rarest] < 2:
            raise ValueError(
                f"The held-out part would leave {left[rarest]} of the {(y == rarest).sum()} "
                f"examples of class {rarest}: lower test_fraction, or add examples of it."
            )
    train, calibration = train_test_split(
        rows, test_size=n_calibration, stratify=y[rows], random_state=random
    )
    return train, calibration, test


def check_classes(y: np.ndarray, n_classes: int, remedy: str = "") -> None:
    """Refuse labels in which a class has fewer than 3 examples, one for each part.

    y          labels (n,), integers 0..K-1
    n_classes  K
    remedy     what to do about it, for the message; "" for a remedy that fits the labels

    Raises ValueError where a class has fewer than 3 examples.

    >>> check_classes(np.array([0, 0, 0, 1, 1]), 2)
    Traceback (most recent call last):
    ...
    ValueError: Class 1 of 0 to 1 has 2 examples, fewer than the 3 that a split into three \
parts needs: add examples of it or drop it.
    """
    counts = np.bincount(y, minlength=n_classes)
    rarest = int(counts.argmin())
    if counts[rarest] >= SMALLEST_CLASS:
        return
    if not remedy and counts[rarest] == 0:
        remedy = "number the labels 0..K-1 without gaps"
    raise ValueError(
        f"Class {rarest} of 0 to {n_classes - 1} has {counts[rarest]} examples, fewer than the "
        f"{SMALLEST_CLASS} that a split into three parts needs: "
        f"{remedy or 'add examples of it or drop it'}."
    )


def split_sentence(sizes: dict[str, int], pool: str, official: bool, order: str, seed: int) -> str:
    """How a data set was split, in words.

    sizes     examples in each part, by the keys train, calibration and test
    pool      what was split, with any notes before it
    official  is the test part an official test set?
    order     "random" or "published"
    seed      of all draws

    >>> sizes = {"train": 6, "calibration": 2, "test": 2}
    >>> split_sentence(sizes, "the pool", False, "random", 0)
    'The pool split at random into 6 train, 2 calibration and 2 held-out samples, stratified \
by class, seed 0.'
    """
    parts = "{train} train, {calibration} calibration and {test} held-out samples"
    end = ""
    if official:
        parts = "{train} train and {calibration} calibration samples"
        end = "; the official test set ({test} samples) is held out whole"
    how = "at random into"
    drawn = "stratified by class"
    if order == "published":
        how = "in the published order into"
        drawn = "shuffled inside each part"
    sentence = f"{pool} split {how} {parts}, {drawn}, seed {seed}{end}.".format(**sizes)
    return sentence[0].upper() + sentence[1:]


def _stratified_subset(y: np.ndarray, n_samples: int, random: np.random.RandomState) -> Rows:
    rows = np.arange(len(y))
    if n_samples == len(y):
        return rows
    n_classes = int(y.max()) + 1
    largest = len(y) - n_classes
    if not n_classes <= n_samples <= largest:
        raise ValueError(
            f"n_samples is {n_samples}: choose {n_classes} to {largest}, or 0 for all {len(y)} "
            "examples."
        )
    kept, _ = train_test_split(rows, train_size=n_samples, stratify=y, random_state=random)
    check_classes(y[kept], n_classes, remedy="raise n_samples")
    return kept
