"""Every random stream of utils by name, so that no two meet by accident.

A stream is a generator made from a run's seed and a number of its own. `STREAMS` is the only place
where the numbers stand; they are those behind the committed results, so a number that two streams
share stays and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# kind: how seed and number are joined
TORCH = "torch"  # torch.Generator, manual_seed(number + seed)
NUMPY = "numpy"  # numpy.random.default_rng([seed, number])
POPULATION = "population"  # numpy.random.default_rng([number, seed])
SPLIT = "split"  # numpy.random.RandomState(seed), which scikit-learn's splits take

STREAMS: dict[str, tuple[str, int]] = {
    # data
    "split": (SPLIT, 0),  # which examples train, calibrate, are held out; their order in a part
    "class means": (NUMPY, 0),  # of the synthetic population; its seed is always 20240917
    "synthetic data set": (POPULATION, 0),  # with seed s it is "orders" of seed 0 at s = 5, and so
    "synthetic draw": (POPULATION, 1),  # on for 7, 11, ...: kept, a finding never uses both
    # networks
    "batches": (TORCH, 0),  # the order in training. Notebooks draw initial weights from the global
    # generator after torch.manual_seed(seed): the same numbers, so the first order is not
    # independent of the weights. Kept: every committed network was trained so.
    "block check": (TORCH, 0),  # random block of the calculus' comparison with autograd
    "marks of outputs": (TORCH, 0x3A4B5),  # directions that tell outputs apart; its seed is 0
    # calculus
    "symmetry": (TORCH, 0x5E77),  # directions that test a chain; they say yes or no and no more
    # hessian
    "lanczos start": (TORCH, 0x5EED_0F_1A7C05),  # of norms, traces, spectra: uniform directions
    "engine": (TORCH, 0x5EED_0F_5411),  # directions that test automatic differentiation
    "derivatives": (TORCH, 0xD1FF),  # the direction of central differences; its seed is 0
    "dense estimate": (NUMPY, 31),  # ARPACK's start for a small dense Hessian
    "pyhessian": (TORCH, 0x9E5510),  # the adapter's scale, and PyHessian's own draws
    # bounds
    "majorant balance": (TORCH, 0xBA1A),  # the direction along which couplings are balanced
    "misfit": (NUMPY, 37),  # bootstrap over examples
    "gram start": (NUMPY, 0),  # ARPACK's start for a Gram matrix; its seed is always 0
    # surface
    "orders": (NUMPY, 5),  # random orders of the examples
    "bootstrap of means": (NUMPY, 7),
    "bootstrap of slopes": (NUMPY, 11),
    "eigenspace start": (NUMPY, 17),  # as "gaussian factor": a start of ARPACK, kept
    "typical first": (NUMPY, 23),  # as "doubling": in different notebooks, kept
    "gaussian probes": (TORCH, 0x6A55),
    "signs of spreads": (TORCH, 0x5163),
    "contrast on a ball": (TORCH, 0),  # its seed is drawn from the seed and both sets of examples:
    # SeedSequence([seed, len(plus), *plus, *minus]).generate_state(1)
    # sample size
    "pairs of a pilot": (NUMPY, 13),
    "gaussian factor": (NUMPY, 17),
    "settling curve": (NUMPY, 19),
    "doubling": (NUMPY, 23),  # the order in which this rival looks at a pilot
    "true size": (NUMPY, 29),
    "ball probes": (TORCH, 0xBA11),
    "signs of a pilot": (TORCH, 0xFA12),
}


def _number(name: str, *kinds: str) -> tuple[str, int]:
    if name not in STREAMS:
        raise ValueError(f"there is no random stream {name!r}: name it in utils/run/streams.py.")
    kind, number = STREAMS[name]
    if kind not in kinds:
        raise ValueError(f"the random stream {name!r} is of kind {kind}: ask for that.")
    return kind, number


def torch_seed(name: str, seed: int) -> int:
    """The number that seeds a PyTorch stream, for a generator that someone else owns.

    name  a stream of `STREAMS`
    seed  of the run, 0 to 4294967295

    Raises ValueError where there is no such stream.

    >>> torch_seed("pyhessian", 1) == 0x9E5510 + 1
    True
    """
    return _number(name, TORCH)[1] + seed


def generator(name: str, seed: int, device: str = "cpu") -> torch.Generator:
    """A stream of PyTorch. On the CPU, the default, a run on a GPU draws the same numbers.

    name    a stream of `STREAMS`
    seed    of the run, 0 to 4294967295
    device  as PyTorch names it

    Raises ValueError where there is no such stream.

    >>> import torch
    >>> start = torch.randn(3, generator=generator("lanczos start", 0))
    >>> torch.equal(start, torch.randn(3, generator=generator("lanczos start", 0)))
    True
    """
    import torch

    return torch.Generator(device).manual_seed(torch_seed(name, seed))


def numpy_generator(name: str, seed: int) -> np.random.Generator:
    """A stream of numpy.

    name  a stream of `STREAMS`
    seed  of the run, 0 to 4294967295

    Raises ValueError where there is no such stream.

    >>> bool((numpy_generator("orders", 3).permutation(9) >= 0).all())
    True
    """
    kind, number = _number(name, NUMPY, POPULATION)
    return np.random.default_rng([seed, number] if kind == NUMPY else [number, seed])


def split_generator(name: str, seed: int) -> np.random.RandomState:
    """A stream of the kind that scikit-learn takes.

    name  a stream of `STREAMS`
    seed  of the run, 0 to 4294967295

    Raises ValueError where there is no such stream.

    >>> split_generator("split", 0).randint(10)
    5
    """
    _number(name, SPLIT)
    return np.random.RandomState(seed)
