"""A data set in the form in which every notebook uses it, and the one function that makes it.

What can be downloaded, with its source, licence, mirrors and checksums, stands in
data/registry.json; data/README.md explains both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from utils.data.published import sha256
from utils.data.readers import Pair, Source, read_source
from utils.data.split import check_classes, split_pool, split_sentence
from utils.run.streams import split_generator

LARGEST_SEED = 2**32 - 1  # of numpy's RandomState
LARGEST_SAMPLE = 2**63 - 1


@dataclass(frozen=True)
class Dataset:
    """The three parts of one data set.

    The order inside every part is random and fixed by the seed, so that the first k examples of
    a part are a random sample.

    x_train        inputs that train the weights, float32 (n, C, H, W) or (n, ...)
    y_train        their labels, int64 (n,)
    x_calibration  inputs that estimate spreads
    y_calibration  their labels
    x_test         inputs held out
    y_test         their labels
    info           where the data come from and how they were split, plain JSON; see `load_dataset`
    """

    x_train: Tensor
    y_train: Tensor
    x_calibration: Tensor
    y_calibration: Tensor
    x_test: Tensor
    y_test: Tensor
    info: dict

    def arrays(self) -> dict[str, np.ndarray]:
        """The six tensors as arrays by name, for an .npz file.

        >>> sorted(load_dataset("synthetic", n_samples=100).arrays())
        ['x_calibration', 'x_test', 'x_train', 'y_calibration', 'y_test', 'y_train']
        """
        names = [f.name for f in fields(self) if f.name != "info"]
        return {name: getattr(self, name).numpy() for name in names}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], info: dict) -> Dataset:
        """The data set that `arrays` came from.

        arrays  as `Dataset.arrays` gives them
        info    the `info` of the data set

        >>> data = load_dataset("synthetic", n_samples=100)
        >>> again = Dataset.from_arrays(data.arrays(), data.info)
        >>> torch.equal(again.x_test, data.x_test)
        True
        """
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls(**tensors, info=info)


def load_dataset(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    seed: int = 0,
    calibration_fraction: float = 0.2,
    test_fraction: float = 0.2,
    n_samples: int = 0,
    order: str = "random",
) -> Dataset:
    """Read, check, split and scale one data set.

    An official test set is the held-out part whole, and `calibration_fraction` is a fraction of the
    training pool; without one, both fractions are of the pool. uint8 inputs are scaled linearly
    from [0, 255] to [-1, 1] (the digits from [0, 16]); floats keep their values.

    name                  digits, mnist, fashion_mnist, cifar10, cifar100, synthetic, or `npz:PATH`
                          with arrays x_train, y_train and optionally x_test, y_test
    root                  a folder with the files already on disk; None or "" means the environment
                          variable DATA_ROOT and, where that is not set either, a checked download
                          into data/downloads
    seed                  of all draws
    calibration_fraction  share that calibrates [1]
    test_fraction         share held out, where there is no official test set [1]
    n_samples             keep a stratified random subset of the pool of this size first, 0 for all
                          [examples]; for `synthetic`, draw that many
    order                 "random", or "published" to draw nothing: of the first `n_samples` of the
                          pool as published the first train and the next calibrate, whether or not
                          there is an official test set; where there is none, `test_fraction` times
                          as many after those are held out (of a whole pool its last). Only the
                          order inside each part is random.

    Returns a Dataset. Its `info` holds name, source, licence, sha256 of each file read,
    matches_published (do all files equal the published ones? None where nothing is published),
    input_shape, n_classes, class_names (or None), inputs (a sentence), sizes, split (a sentence),
    seed, and duplicates_across_parts: the calibration examples whose input occurs byte for byte in
    train, plus the held-out examples whose input occurs in train or calibration.

    Raises FileNotFoundError for no such file or folder, no mirror within reach; ValueError for an
    unknown name, truncated, corrupt or swapped file, NaN, labels that are not 0..K-1, fewer than 3
    examples in a class, arguments out of range.

    >>> data = load_dataset("digits", seed=0)
    >>> tuple(data.x_train.shape), data.info["sizes"]["test"]
    ((1079, 1, 8, 8), 359)
    """
    _check_whole("seed", seed, LARGEST_SEED)
    _check_whole("n_samples", n_samples, LARGEST_SAMPLE)
    _check_fractions(calibration_fraction, test_fraction)
    if order not in ("random", "published"):
        raise ValueError(f"order is {order!r}: choose random or published.")
    source = read_source(name, root, seed, n_samples)
    n_classes = _count_classes(source)
    official = source.x_test is not None
    random = split_generator("split", seed)
    rows = split_pool(
        source.y,
        0 if name == "synthetic" else n_samples,
        calibration_fraction,
        None if official else test_fraction,
        order,
        random,
    )
    parts = {part: (source.x[chosen], source.y[chosen]) for part, chosen in rows.items()}
    if source.x_test is not None and source.y_test is not None:
        shuffled = random.permutation(len(source.y_test))
        parts["test"] = (source.x_test[shuffled], source.y_test[shuffled])
    sizes = {part: len(y) for part, (_, y) in parts.items()}
    pool = source.note + _pool_in_words(name, sizes, n_samples, official, order)
    inputs = "values kept as given"
    if source.x.dtype == np.uint8:
        inputs = f"scaled linearly from [0, {source.white}] to [-1, 1]"
    info = source.about | {
        "input_shape": list(source.x.shape[1:]),
        "n_classes": n_classes,
        "inputs": inputs,
        "sizes": sizes,
        "split": split_sentence(sizes, pool, official, order, seed),
        "seed": int(seed),
        "duplicates_across_parts": _count_duplicates(parts),
    }
    tensors = {f"x_{part}": _scaled(x, source.white) for part, (x, _) in parts.items()}
    tensors |= {f"y_{part}": torch.from_numpy(y) for part, (_, y) in parts.items()}
    return Dataset(**tensors, info=info)


def _count_classes(source: Source) -> int:
    names = source.about["class_names"]
    largest = source.y.max()
    if largest >= len(source.y):
        raise ValueError(
            f"y_train holds the label {largest} in {len(source.y)} examples: number the labels "
            "0..K-1."
        )
    n_classes = len(names) if names else int(largest) + 1
    if n_classes < 2:
        raise ValueError(
            "y_train holds a single class: give labels of at least 2 classes, numbered from 0."
        )
    check_classes(source.y, n_classes)
    if source.y_test is not None and source.y_test.max() >= n_classes:
        raise ValueError(
            f"y_test holds the label {source.y_test.max()}, which y_train does not: use the same "
            "classes in both."
        )
    return n_classes


def _pool_in_words(
    name: str, sizes: dict[str, int], n_samples: int, official: bool, order: str
) -> str:
    if name == "synthetic":
        return "the draws"
    if not n_samples:
        return "the pool"
    if order == "random":
        return f"a stratified subset of {n_samples}"
    first = n_samples if official else sum(sizes.values())
    return f"the first {first} samples"


def _scaled(x: np.ndarray, white: int) -> Tensor:
    """uint8 from [0, white] to [-1, 1] in float32; floats as they are."""
    tensor = torch.from_numpy(x)
    if tensor.dtype != torch.uint8:
        return tensor
    return tensor.float().div_(white / 2).sub_(1)


def _count_duplicates(parts: dict[str, Pair]) -> int:
    """Examples whose input occurs in an earlier part, byte for byte."""
    seen: set[str] = set()
    count = 0
    for x, _ in parts.values():
        digests = [sha256(row.tobytes()) for row in x]
        count += sum(digest in seen for digest in digests)
        seen.update(digests)
    return count


def _check_whole(name: str, value: int, largest: int) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 0 <= value <= largest:
        raise ValueError(f"{name} is {value!r}: give a whole number from 0 to {largest}.")


def _check_fractions(calibration_fraction: float, test_fraction: float) -> None:
    fractions = {"calibration_fraction": calibration_fraction, "test_fraction": test_fraction}
    for name, value in fractions.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 1:
            raise ValueError(f"{name} is {value!r}: give a number between 0 and 1.")
    if calibration_fraction + test_fraction >= 1:
        raise ValueError(
            f"calibration_fraction {calibration_fraction} and test_fraction {test_fraction} leave "
            "nothing to train on: give fractions with a sum below 1."
        )
