"""A synthetic population that is known exactly: Gaussian classes with fixed means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils.run.streams import numpy_generator

SHAPE = (1, 8, 8)
CLASSES = 4
NOISE = 0.5  # standard deviation of every pixel around its class mean
SPREAD = 0.15  # standard deviation of the entries of the class means
SIZE = 2000  # examples of the data set where nobody says how many

DATASET_STREAM = "synthetic data set"
FRESH_STREAM = "synthetic draw"
MEANS_SEED = 20240917


def class_means() -> np.ndarray:
    """The means of the classes, the same for every seed, so that there is one population.

    Returns an array (K, C, H, W) float64.

    >>> class_means().shape
    (4, 1, 8, 8)
    """
    random = numpy_generator("class means", MEANS_SEED)
    return SPREAD * random.standard_normal((CLASSES, *SHAPE))


def synthetic_examples(n: int, stream: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n independent examples of the population, as arrays.

    n       number of examples
    stream  DATASET_STREAM or FRESH_STREAM; two streams share no random number
    seed    selects the draw within its stream

    Returns x (n, C, H, W) float32 and y (n,) int64.

    >>> x, y = synthetic_examples(3, DATASET_STREAM, seed=0)
    >>> x.shape, y.shape
    ((3, 1, 8, 8), (3,))
    """
    random = numpy_generator(stream, seed)
    y = random.integers(CLASSES, size=n)
    noise = random.standard_normal((n, *SHAPE))
    x = class_means()[y] + NOISE * noise
    return x.astype(np.float32), y.astype(np.int64)


def synthetic_draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n fresh examples of the population that `load_dataset("synthetic")` draws from.

    They are independent of that data set. The mean loss of a classifier over them is an unbiased
    estimate of its population loss, with standard error (spread of the losses) / sqrt(n).

    n     number of examples
    seed  of the draw; no seed repeats an example of any `load_dataset("synthetic")`

    Returns x (n, 1, 8, 8) float32 and y (n,) int64.

    >>> x, y = synthetic_draw(5, seed=0)
    >>> x.dtype, tuple(y.shape)
    (torch.float32, (5,))
    """
    x, y = synthetic_examples(n, FRESH_STREAM, seed)
    return torch.from_numpy(x), torch.from_numpy(y)


def synthetic_teacher(x: Tensor) -> Tensor:
    """Logits of the population: p(y | x) = softmax(synthetic_teacher(x))[y], exactly.

    With equal priors and x | y ~ N(mu_y, s^2 I), Bayes' rule gives the logits
    <mu_k, x> / s^2 - |mu_k|^2 / (2 s^2). No classifier has a smaller mean cross-entropy.

    x  inputs (n, 1, 8, 8)

    Returns logits (n, K) float64 [nat].

    Source: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, section 4.3.

    >>> x, y = synthetic_draw(1000, seed=0)
    >>> round((synthetic_teacher(x).argmax(1) == y).double().mean().item(), 2)
    0.87
    """
    means = torch.from_numpy(class_means()).flatten(1)  # (K, d)
    projections = x.double().flatten(1) @ means.T  # (n, K)
    half_squares = means.square().sum(1) / 2
    return (projections - half_squares) / NOISE**2
