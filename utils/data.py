"""The data sets: readers, checks, and the stratified split into train, calibration and held-out parts.

Every set comes out of `load_dataset` in one form, `Dataset`. What can be downloaded, with its source, licence, mirrors
and checksums, stands in data/registry.json; data/README.md explains both to a reader.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = ROOT / "data" / "registry.json"
DOWNLOADS = ROOT / "data" / "downloads"
NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "synthetic")

SYNTHETIC_SHAPE = (1, 8, 8)
SYNTHETIC_CLASSES = 4
SYNTHETIC_NOISE = 0.5  # standard deviation of every pixel around its class mean
SYNTHETIC_SPREAD = 0.15  # standard deviation of the entries of the class means
SYNTHETIC_SIZE = 2000  # samples drawn where n_samples does not say


@dataclass(frozen=True)
class Dataset:
    """The three parts of one data set: x float32 (n, C, H, W) or (n, ...), y int64 (n,); `info` is plain JSON.

    The order inside every part is random and fixed by the seed, so that the first k samples are a random sample.
    """

    x_train: Tensor
    y_train: Tensor
    x_calibration: Tensor
    y_calibration: Tensor
    x_test: Tensor
    y_test: Tensor
    info: dict

    def arrays(self) -> dict[str, np.ndarray]:
        """The six tensors as arrays by name, for an .npz file."""
        return {f.name: getattr(self, f.name).numpy() for f in fields(self) if f.name != "info"}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], info: dict) -> Dataset:
        """The data set that `arrays` came from."""
        return cls(**{name: torch.from_numpy(a) for name, a in arrays.items()}, info=info)


@dataclass
class _Source:
    """What a reader found: the pool and, where there is one, the official test set; `top` is white in uint8 inputs."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    about: dict = field(default_factory=dict)
    top: int = 255
    note: str = ""


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

    `name`: digits, mnist, fashion_mnist, cifar10, cifar100, synthetic, or `npz:PATH` with arrays x_train, y_train and
    optionally x_test, y_test. `root`: a folder with the files already on disk; None or "" means the environment
    variable DATA_ROOT and, where that is not set either, a checked download into data/downloads.

    An official test set is the held-out part whole, and `calibration_fraction` is a fraction of the training pool;
    without one, both fractions are of the pool. `n_samples` > 0 keeps a stratified random subset of the pool first
    (for `synthetic`: draws that many). All draws follow from `seed` alone. `order` "published" draws nothing: of the
    first `n_samples` of the pool as published the first train and the next calibrate, whether or not there is an
    official test set; where there is none, `test_fraction` times as many after those are held out (of a whole pool its
    last). Only the order inside each part is random.

    uint8 inputs are scaled linearly from [0, 255] to [-1, 1] (the digits from [0, 16]); floats keep their values.
    `info` holds name, source, licence, sha256 of each file read, matches_published (do all files equal the published
    ones? None where nothing is published), input_shape, n_classes, class_names (or None), sizes, split (a sentence),
    seed, inputs (a sentence) and duplicates_across_parts: the calibration samples whose input occurs byte for byte
    in train, plus the held-out samples whose input occurs in train or calibration.

    Raises FileNotFoundError or ValueError, one sentence each: unknown name, missing, truncated, corrupt or swapped
    file, no mirror within reach, NaN, labels that are not 0..K-1, fewer than 3 samples in a class, arguments out of
    range.
    """
    _check_arguments(seed, calibration_fraction, test_fraction, n_samples)
    if order not in ("random", "published"):
        raise ValueError(f"order is {order!r}: choose random or published.")
    source = _read(name, root, seed, n_samples)
    names = source.about["class_names"]
    n_classes = len(names) if names else int(source.y.max()) + 1
    if n_classes < 2:
        raise ValueError("y_train holds a single class: give labels of at least 2 classes, numbered from 0.")
    _check_classes(source.y, n_classes)

    random = np.random.RandomState(seed)
    pool, fractions = np.arange(len(source.y)), (calibration_fraction, test_fraction)
    if source.x_test is not None:
        fractions = calibration_fraction, None
    if n_samples and name != "synthetic" and order == "random":
        pool = _subset(source.y, n_samples, n_classes, random)
    elif n_samples and name != "synthetic":
        held_out = round(test_fraction * n_samples) if source.x_test is None else 0
        if n_samples + held_out > len(pool):
            raise ValueError(
                f"n_samples is {n_samples} with {held_out} held out after them: choose at most {len(pool)} together."
            )
        pool = pool[: n_samples + held_out]
        if held_out:
            fractions = calibration_fraction * n_samples / len(pool), held_out / len(pool)
    train, calibration, test = split(source.y[pool], *fractions, random, order)
    parts = {"train": (source.x, source.y, pool[train]), "calibration": (source.x, source.y, pool[calibration])}
    if source.x_test is None:
        parts["test"] = (source.x, source.y, pool[test])
    else:
        if source.y_test.max() >= n_classes:
            raise ValueError(
                f"y_test holds the label {source.y_test.max()}, which y_train does not: use the same classes in both."
            )
        parts["test"] = (source.x_test, source.y_test, random.permutation(len(source.y_test)))

    raw = {part: x[rows] for part, (x, _, rows) in parts.items()}
    tensors = {}
    for part, (_, y, rows) in parts.items():
        tensors[f"x_{part}"] = torch.from_numpy(_scaled(raw[part], source.top))
        tensors[f"y_{part}"] = torch.from_numpy(y[rows].astype(np.int64))

    sizes = {part: len(rows) for part, (_, _, rows) in parts.items()}
    uint8 = source.x.dtype == np.uint8
    info = source.about | {
        "input_shape": [int(s) for s in source.x.shape[1:]],
        "n_classes": n_classes,
        "inputs": f"scaled linearly from [0, {source.top}] to [-1, 1]" if uint8 else "values kept as given",
        "sizes": sizes,
        "split": _split_sentence(sizes, source, n_samples, name, seed, order),
        "seed": int(seed),
        "duplicates_across_parts": _duplicates(raw),
    }
    return Dataset(**tensors, info=info)


# --- the split -----------------------------------------------------------------------------------


def split(
    y: np.ndarray,
    calibration_fraction: float,
    test_fraction: float | None,
    random: np.random.RandomState,
    order: str = "random",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint row numbers (train, calibration, test), stratified by y, in random order, together all of 0..n-1.

    Sizes are the rounded fractions of n; `test_fraction` None means that there is a test set elsewhere (test is
    empty). With `order` "published" the parts follow each other and only the order inside them is random.
    Raises ValueError where a part would be smaller than the number of classes.
    """
    rows, test = np.arange(len(y)), np.arange(0)
    n_classes = len(np.unique(y))
    n_test = 0 if test_fraction is None else round(test_fraction * len(y))
    n_calibration = round(calibration_fraction * len(y))
    for part, size in (
        ("calibration", n_calibration),
        ("test", n_test if test_fraction is not None else n_classes),
        ("train", len(y) - n_test - n_calibration),
    ):
        if size < n_classes:
            raise ValueError(
                f"The {part} part would have {size} of {len(y)} samples, fewer than the {n_classes} classes: change "
                "calibration_fraction or test_fraction, or use more samples."
            )
    if order == "published":
        train, calibration, test = np.split(rows, np.cumsum([len(y) - n_test - n_calibration, n_calibration]))
        return tuple(random.permutation(part) for part in (train, calibration, test))
    if n_test:
        rows, test = train_test_split(rows, test_size=n_test, stratify=y, random_state=random)
    train, calibration = train_test_split(rows, test_size=n_calibration, stratify=y[rows], random_state=random)
    return train, calibration, test


def _subset(y: np.ndarray, n_samples: int, n_classes: int, random: np.random.RandomState) -> np.ndarray:
    if n_samples == len(y):
        return np.arange(len(y))
    if not n_classes <= n_samples <= len(y) - n_classes:
        raise ValueError(
            f"n_samples is {n_samples}: choose {n_classes} to {len(y) - n_classes}, or 0 for all {len(y)} samples."
        )
    kept, _ = train_test_split(np.arange(len(y)), train_size=n_samples, stratify=y, random_state=random)
    _check_classes(y[kept], n_classes, "raise n_samples")
    return kept


def _split_sentence(sizes: dict, source: _Source, n_samples: int, name: str, seed: int, order: str) -> str:
    published = order == "published"
    subset = (
        f"the first {sum(sizes.values()) if source.x_test is None else n_samples} samples"
        if published
        else f"a stratified subset of {n_samples}"
    )
    pool = "the draws" if name == "synthetic" else subset if n_samples else "the pool"
    parts = f"{sizes['train']} train and {sizes['calibration']} calibration"
    if source.x_test is None:
        parts = f"{sizes['train']} train, {sizes['calibration']} calibration and {sizes['test']} held-out"
    official = "" if source.x_test is None else f"; the official test set ({sizes['test']} samples) is held out whole"
    how = "split in the published order" if published else "split at random"
    drawn = f"shuffled inside each part, seed {seed}" if published else f"stratified by class, seed {seed}"
    sentence = f"{source.note}{pool} {how} into {parts} samples, {drawn}{official}."
    return sentence[0].upper() + sentence[1:]


def _duplicates(raw: dict[str, np.ndarray]) -> int:
    seen: set[bytes] = set()
    count = 0
    for part in ("train", "calibration", "test"):
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in raw[part]]
        count += sum(d in seen for d in digests)
        seen.update(digests)
    return count


def _scaled(x: np.ndarray, top: int) -> np.ndarray:
    if x.dtype != np.uint8:
        return x
    x = x.astype(np.float32)
    x /= np.float32(top / 2)
    x -= np.float32(1)
    return x


# --- checks --------------------------------------------------------------------------------------


def _check_arguments(seed, calibration_fraction, test_fraction, n_samples) -> None:
    for name, value, top in (("seed", seed, 2**32 - 1), ("n_samples", n_samples, 2**63 - 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= top:
            raise ValueError(f"{name} is {value!r}: give a whole number from 0 to {top}.")
    for name, value in (("calibration_fraction", calibration_fraction), ("test_fraction", test_fraction)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"{name} is {value!r}: give a number between 0 and 1.")
    if calibration_fraction + test_fraction >= 1:
        raise ValueError(
            f"calibration_fraction {calibration_fraction} and test_fraction {test_fraction} leave nothing to train on: "
            "give fractions with a sum below 1."
        )


def _check_classes(y: np.ndarray, n_classes: int, remedy: str = "") -> None:
    """Every class 0..K-1 has at least 3 samples."""
    counts = np.bincount(y, minlength=n_classes)
    rarest = int(counts.argmin())
    if counts[rarest] < 3:
        gaps = "number the labels 0..K-1 without gaps" if counts[rarest] == 0 else "add samples of it or drop it"
        raise ValueError(
            f"Class {rarest} of 0 to {n_classes - 1} has {counts[rarest]} samples, fewer than the 3 that a split into "
            f"three parts needs: {remedy or gaps}."
        )


def _checked_pair(x: np.ndarray, y: np.ndarray, part: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A user's arrays as float32 or uint8 (n, ...) and int64 (n,), or a ValueError that names what is wrong."""
    x_name, y_name = f"x_{part} in {where}", f"y_{part} in {where}"
    if not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise ValueError(f"{x_name} has dtype {x.dtype}: give floats, kept as they are, or uint8 with 0..255.")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{x_name} has shape {x.shape}: give (n, ...) with at least one sample and one feature.")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{y_name} has dtype {y.dtype}: give integer labels 0..K-1.")
    if y.ndim != 1:
        raise ValueError(f"{y_name} has shape {y.shape}: give one label a sample, shape (n,).")
    if len(x) != len(y):
        raise ValueError(f"{x_name} has {len(x)} samples and y_{part} {len(y)} labels: give one label a sample.")
    if y.min() < 0:
        raise ValueError(f"{y_name} holds the negative label {y.min()}: number the labels 0..K-1.")
    if y.max() >= len(y) and part == "train":
        raise ValueError(f"{y_name} holds the label {y.max()} in {len(y)} samples: number the labels 0..K-1.")
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        bad = int((~np.isfinite(x)).any(axis=tuple(range(1, x.ndim))).sum())
        if bad:
            raise ValueError(f"{x_name} has NaN or values beyond float32 in {bad} of {len(x)} samples: remove them.")
    return np.ascontiguousarray(x), y.astype(np.int64)


# --- readers -------------------------------------------------------------------------------------


def _read(name: str, root, seed: int, n_samples: int) -> _Source:
    if isinstance(name, str) and name.startswith("npz:"):
        return _read_npz(name.removeprefix("npz:"))
    if name not in NAMES:
        raise ValueError(f"There is no data set {name!r}: choose {', '.join(NAMES)}, or npz:PATH for your own arrays.")
    if name == "synthetic":
        return _read_synthetic(seed, n_samples)
    registry = json.loads(REGISTRY.read_text(encoding="utf-8"))
    entry = registry[name]
    entry["published"] = {p["sha256"]: file for other in registry.values() for file, p in other["files"].items()}
    about = {"name": name, "source": entry["source"], "licence": entry["licence"], "sha256": {}}
    about |= {"matches_published": True, "class_names": entry["class_names"].split(", ")}
    if name == "digits":
        return _read_digits(about, entry)
    folder, on_disk = _folder(root)
    if not on_disk:
        _download(entry, folder)
    if "archive" in entry:
        return _read_cifar(name, folder, about, entry)
    return _read_mnist(folder, about, entry)


def _folder(root) -> tuple[Path, bool]:
    """(folder, True) for files on disk, (data/downloads, False) where they may be downloaded."""
    root = root or os.environ.get("DATA_ROOT", "")
    if not root:
        return DOWNLOADS, False
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root}: set DATA_ROOT to the folder with the data, or leave it empty."
        )
    return folder, True


def _bytes(folder: Path, file: str, about: dict, entry: dict) -> bytes:
    """The content of one file, uncompressed; its checksum goes into `about`. Another published file is refused."""
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {file} in {folder}: put it there, or leave DATA_ROOT empty to download it."
        )
    content = path.read_bytes()
    about["sha256"][file] = _sha256(content)
    content = _uncompressed(content, file)
    published = entry["published"].get(_sha256(content))
    if published not in (file, None):
        raise ValueError(f"{file} holds what is published as {published}: put every file under its own name.")
    if published is None and len(content) == entry["files"].get(file, {}).get("bytes"):
        raise ValueError(f"{file} has the published length and another content: delete it and fetch it again.")
    about["matches_published"] &= published == file
    return content


def _uncompressed(content: bytes, file: str) -> bytes:
    try:
        return gzip.decompress(content) if file.endswith(".gz") else content
    except (EOFError, OSError, zlib.error):
        raise ValueError(f"{file} is truncated or not a gzip file: delete it and fetch it again.") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _idx(content: bytes, file: str, ndim: int) -> np.ndarray:
    """An idx array of unsigned bytes: magic 0 0 8 ndim, `ndim` big-endian sizes, then the values."""
    header = 4 + 4 * ndim
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < header:
        kind = "images (magic 0x00000803)" if ndim == 3 else "labels (magic 0x00000801)"
        raise ValueError(f"{file} is not an idx file of {kind}: delete it and fetch it again.")
    shape = [int(s) for s in np.frombuffer(content, ">u4", ndim, 4)]
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected or expected == header:
        raise ValueError(
            f"{file} holds {len(content)} bytes where its header announces {expected}: delete it and fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_mnist(folder: Path, about: dict, entry: dict) -> _Source:
    arrays = []
    for images, labels in zip(*[iter(entry["files"])] * 2, strict=True):
        x = _idx(_bytes(folder, images, about, entry), images, 3)[:, None]  # (n, 1, H, W)
        y = _idx(_bytes(folder, labels, about, entry), labels, 1)
        if len(x) != len(y):
            raise ValueError(f"{images} has {len(x)} images and {labels} {len(y)} labels: fetch both again.")
        arrays += [x, _known_labels(y, labels, about)]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError("The training and the test images differ in size: fetch both files of images again.")
    return _Source(*arrays, about=about)


def _read_cifar(name: str, folder: Path, about: dict, entry: dict) -> _Source:
    """Records of `labels` label bytes (the last one is used) and 3 x 32 x 32 pixels, channel first."""
    labels = 1 if name == "cifar10" else 2
    train, test = [file for file in entry["files"] if "test" not in file], [f for f in entry["files"] if "test" in f]
    present = [file for file in train if (folder / file).is_file()]
    parts = []
    for file in (present or train[:1]) + [file for file in test if (folder / file).is_file()]:
        content = _bytes(folder, file, about, entry)
        if not content or len(content) % (labels + 3072):
            raise ValueError(
                f"{file} holds {len(content)} bytes, not a multiple of {labels + 3072}: it is truncated or another "
                "format, so delete it and fetch the binary version again."
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, labels + 3072)
        x = records[:, labels:].reshape(-1, 3, 32, 32)
        parts.append((file, x, _known_labels(records[:, labels - 1], file, about)))
    pool = [(x, y) for file, x, y in parts if file in train]
    held_out = [(x, y) for file, x, y in parts if file in test]
    note = "" if len(present) == len(train) else f"only {len(present)} of {len(train)} training batches are present; "
    note += "" if held_out else "the official test file is absent, so the held-out part comes from training images; "
    arrays = [np.concatenate([p[i] for p in group]) for group in (pool, held_out) if group for i in (0, 1)]
    return _Source(*arrays, about=about, note=note)


def _known_labels(y: np.ndarray, file: str, about: dict) -> np.ndarray:
    n_classes = len(about["class_names"])
    if y.max() >= n_classes:
        raise ValueError(f"{file} holds the label {y.max()}, beyond {n_classes - 1}: delete it and fetch it again.")
    return y.astype(np.int64)


def _read_digits(about: dict, entry: dict) -> _Source:
    from sklearn.datasets import load_digits

    _bytes(package_files("sklearn.datasets") / "data", *entry["files"], about, entry)
    digits = load_digits()
    x = digits.images[:, None].astype(np.uint8)  # (1797, 1, 8, 8), whole numbers 0..16
    return _Source(x, digits.target.astype(np.int64), about=about, top=16)


def _read_npz(path: str) -> _Source:
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise FileNotFoundError(f"There is no file {path!r}: give npz:PATH with the path of an existing .npz file.")
    content = file.read_bytes()
    arrays = {}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            for key in ("x_train", "y_train", "x_test", "y_test"):
                if key in archive.files:
                    arrays[key] = archive[key]
    except Exception as error:  # a damaged archive can fail anywhere in zip, zlib or the array header
        damage = "holds pickled objects" if "Object arrays" in str(error) else "is truncated or not an .npz archive"
        raise ValueError(
            f"{file.name} {damage}: write it again with np.savez(path, x_train=..., y_train=...) from number arrays."
        ) from None
    for key in ("x_train", "y_train"):
        if key not in arrays:
            raise ValueError(f"{file.name} has no array {key}: save x_train and y_train (and x_test, y_test) in it.")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{file.name} has only one of x_test and y_test: save both or neither.")
    x, y = _checked_pair(arrays["x_train"], arrays["y_train"], "train", file.name)
    x_test = y_test = None
    if "x_test" in arrays:
        x_test, y_test = _checked_pair(arrays["x_test"], arrays["y_test"], "test", file.name)
        if x_test.shape[1:] != x.shape[1:] or x_test.dtype != x.dtype:
            raise ValueError(
                f"x_test in {file.name} is {x_test.dtype} {x_test.shape[1:]} a sample and x_train {x.dtype} "
                f"{x.shape[1:]}: give both the same type and shape."
            )
    about = {"name": f"npz:{file.name}", "source": f"arrays in {file.name}, given by the user", "licence": "the user's"}
    about |= {"sha256": {file.name: _sha256(content)}}
    about |= {"matches_published": None, "class_names": None}
    return _Source(x, y, x_test, y_test, about)


# --- synthetic data with a known population --------------------------------------------------------


def _synthetic_means() -> np.ndarray:
    """The class means (K, C, H, W): fixed once for all seeds, so that there is one population."""
    random = np.random.default_rng(20240917)
    return SYNTHETIC_SPREAD * random.standard_normal((SYNTHETIC_CLASSES, *SYNTHETIC_SHAPE))


def synthetic_teacher(x: Tensor) -> Tensor:
    """Log-odds (n, K) float64 of the synthetic population: p(y | x) = softmax(synthetic_teacher(x))[y], exactly.

    With equal priors and x | y ~ N(mu_y, s^2 I), Bayes' rule gives the logits <mu_k, x> / s^2 - |mu_k|^2 / (2 s^2).
    """
    means = torch.from_numpy(_synthetic_means()).flatten(1)  # (K, d)
    return (x.double().flatten(1) @ means.T - means.square().sum(1) / 2) / SYNTHETIC_NOISE**2


def synthetic_draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n fresh samples of the population that `load_dataset("synthetic")` draws from, independent of it for every seed.

    x float32 (n, 1, 8, 8), y int64 (n,). The mean loss of a classifier over such draws is an unbiased estimate of its
    population loss with standard error (spread of the losses) / sqrt(n); that of `synthetic_teacher` is the smallest
    possible cross-entropy.
    """
    return tuple(torch.from_numpy(a) for a in _synthetic_arrays(n, np.random.default_rng([1, seed])))


def _synthetic_arrays(n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    y = random.integers(SYNTHETIC_CLASSES, size=n)
    x = _synthetic_means()[y] + SYNTHETIC_NOISE * random.standard_normal((n, *SYNTHETIC_SHAPE))
    return x.astype(np.float32), y.astype(np.int64)


def _read_synthetic(seed: int, n_samples: int) -> _Source:
    x, y = _synthetic_arrays(n_samples or SYNTHETIC_SIZE, np.random.default_rng([0, seed]))
    about = {
        "name": "synthetic",
        "source": f"{SYNTHETIC_CLASSES} Gaussian classes with fixed means and standard deviation {SYNTHETIC_NOISE}, "
        "drawn by utils/data.py",
        "licence": "MIT, as this repository",
        "sha256": {},
        "matches_published": None,
        "class_names": [str(k) for k in range(SYNTHETIC_CLASSES)],
    }
    return _Source(x, y, about=about)


# --- downloads -------------------------------------------------------------------------------------


def _download(entry: dict, folder: Path) -> None:
    """Fetch what is missing or altered in `folder`; what is there with its published content is kept.

    A download is checked in `folder`.tmp beside it and then renamed, so `folder` never holds anything else, not even of
    a process that was killed. One process downloads while others wait. Raises FileNotFoundError where no mirror has a
    file, OSError where `folder` cannot be written, with one sentence.
    """
    if not _missing(entry, folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): make it writable, or set DATA_ROOT to a folder that holds "
            "the files."
        ) from None
    scratch = folder.with_suffix(".tmp")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        downloads: dict[str, list[str]] = {}  # the missing files in each
        for file in _missing(entry, folder):  # asked again: the process waited for may have fetched them
            downloads.setdefault(entry.get("archive", Path(file).name), []).append(file)
        try:
            for name, files in downloads.items():
                _fetch(name, files, entry, folder, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _missing(entry: dict, folder: Path) -> list[str]:
    paths = {file: folder / file for file in entry["files"]}
    return [f for f, path in paths.items() if not path.is_file() or not _is_published(path.read_bytes(), f, entry)]


def _is_published(content: bytes, file: str, entry: dict) -> bool:
    try:
        return entry["published"].get(_sha256(_uncompressed(content, file))) == file
    except ValueError:
        return False


def _fetch(name: str, files: list[str], entry: dict, folder: Path, scratch: Path) -> None:
    """`files` into `folder` out of the download `name`, an archive or a file, of the first mirror that has them."""
    failures = []
    for url in [mirror + name for mirror in entry["mirrors"]]:
        try:
            return _fetch_from(url, files, entry, folder, scratch)
        except Exception as error:  # the network or the disk, or a damaged archive anywhere in gzip, zlib or tar
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise OSError(f"{folder} cannot hold {name} ({error.strerror}): make room in it.") from None
            reason = str(error) if type(error) is ValueError else getattr(error, "strerror", "") or type(error).__name__
            failures.append(f"{url} ({reason})")
    raise FileNotFoundError(
        f"{name} could not be downloaded from {' or '.join(failures)}: check the network, or put "
        f"{', '.join(_missing(entry, folder))} into {folder}, or set DATA_ROOT to a folder that holds the set."
    )


def _fetch_from(url: str, files: list[str], entry: dict, folder: Path, scratch: Path) -> None:
    import pooch

    scratch.mkdir(exist_ok=True)
    download = scratch / url.rsplit("/", 1)[1]
    print(f"Downloading {url}", file=sys.stderr)
    pooch.HTTPDownloader(progressbar=True)(url, download, None)
    with tarfile.open(download) if "archive" in entry else nullcontext() as archive:
        for file in files:
            content = archive.extractfile(file).read() if archive else download.read_bytes()
            if not _is_published(content, file, entry):
                raise ValueError(f"its {file} has not the published checksum")
            checked = scratch / "checked"
            checked.write_bytes(content)
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(checked, folder / file)
