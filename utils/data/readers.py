"""The readers: from files in their published formats, or your own arrays, to checked arrays."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from utils.data import download, synthetic
from utils.data.arrays import checked_arrays
from utils.data.published import PublishedFolder, PublishedSet, published_set, sha256

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "synthetic")

CIFAR_PIXELS = 3 * 32 * 32
DIGITS_WHITE = 16  # the digits count the dark pixels of a 4 x 4 block

Pair = tuple[np.ndarray, np.ndarray]


@dataclass
class Source:
    """What a reader found.

    x       inputs (n, ...) of the pool, float32 or uint8
    y       labels (n,) of the pool, int64
    about   name, source, licence, sha256, matches_published, class_names; plain JSON
    x_test  inputs of the official test set, None where there is none
    y_test  its labels
    white   the largest value of uint8 inputs
    note    what a reader of the split should know, ending in "; ", or ""
    """

    x: np.ndarray
    y: np.ndarray
    about: dict
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    white: int = 255
    note: str = ""


def read_source(name: str, root: str | os.PathLike | None, seed: int, n_samples: int) -> Source:
    """Read and check one data set, unsplit.

    name       one of NAMES, or `npz:PATH`
    root       folder with the files; None or "" for the environment variable DATA_ROOT, or a
               download
    seed       of the draw, for `synthetic`
    n_samples  examples to draw, for `synthetic`; 0 for its usual size

    Raises FileNotFoundError where a file, or a folder, or a way to download it, is missing;
    ValueError where the name is unknown or a file is damaged, swapped or of another format.

    >>> read_source("digits", None, seed=0, n_samples=0).x.shape
    (1797, 1, 8, 8)
    """
    if isinstance(name, str) and name.startswith("npz:"):
        return read_npz(name.removeprefix("npz:"))
    if name not in NAMES:
        raise ValueError(
            f"There is no data set {name!r}: choose {', '.join(NAMES)}, or npz:PATH for your "
            "own arrays."
        )
    if name == "synthetic":
        return _drawn(seed, n_samples or synthetic.SIZE)
    published = published_set(name)
    if name == "digits":
        return _read_digits(published)
    files = PublishedFolder(_folder(root, published), published)
    if published.archive:
        return _read_cifar(name, files)
    return _read_mnist(name, files)


def parse_idx(content: bytes, file: str, ndim: int) -> np.ndarray:
    """An array of unsigned bytes in the idx format.

    content  magic number 0 0 8 ndim, `ndim` big-endian sizes of 4 bytes, then the values
    file     its name, for messages
    ndim     3 for images, 1 for labels

    Returns an array uint8, read-only.

    Raises ValueError for another format, or another length than the header announces.

    Source: LeCun, Cortes, Burges, the MNIST database, "File formats".

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), "labels", 1).tolist()
    [7, 9]
    """
    header = 4 + 4 * ndim
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < header:
        kind = "images" if ndim == 3 else "labels"
        raise ValueError(
            f"{file} is not an idx file of {kind} (magic 0x0000080{ndim}): delete it and fetch it "
            "again."
        )
    shape = np.frombuffer(content, ">u4", count=ndim, offset=4).tolist()
    expected = header + math.prod(shape)
    if len(content) != expected or expected == header:
        raise ValueError(
            f"{file} holds {len(content)} bytes where its header announces {expected}: delete it "
            "and fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def parse_cifar(content: bytes, file: str, label_bytes: int) -> Pair:
    """Images and labels of a binary CIFAR file.

    content      records of `label_bytes` labels, of which the last counts, and 3 x 32 x 32 pixels
    file         its name, for messages
    label_bytes  1 for CIFAR-10, 2 for CIFAR-100 (coarse, fine)

    Returns x (n, 3, 32, 32) and y (n,), both uint8.

    Raises ValueError where the length is no multiple of a record's.

    Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".

    >>> x, y = parse_cifar(bytes([6]) + bytes(3072), "one.bin", 1)
    >>> x.shape, y.tolist()
    ((1, 3, 32, 32), [6])
    """
    length = label_bytes + CIFAR_PIXELS
    if not content or len(content) % length:
        raise ValueError(
            f"{file} holds {len(content)} bytes, not a multiple of {length}: it is truncated or "
            "another format, so delete it and fetch the binary version again."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return images, records[:, label_bytes - 1]


def read_npz(path: str) -> Source:
    """Your own arrays x_train, y_train and optionally x_test, y_test.

    path  an .npz file; ~ stands for the home folder

    Raises FileNotFoundError where there is no such file; ValueError where it is damaged, holds
    pickled objects, or arrays that are no examples with labels.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = Path(folder.name, "mine.npz")
    >>> np.savez(file, x_train=np.zeros((6, 2)), y_train=np.arange(6) % 2)
    >>> read_npz(str(file)).x.shape
    (6, 2)
    """
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise FileNotFoundError(
            f"There is no file {path!r}: give npz:PATH with the path of an existing .npz file."
        )
    content = file.read_bytes()
    arrays = checked_arrays(content, file.name)
    about = {
        "name": f"npz:{file.name}",
        "source": f"arrays in {file.name}, given by the user",
        "licence": "the user's",
        "sha256": {file.name: sha256(content)},
        "matches_published": None,
        "class_names": None,
    }
    x_test = arrays.get("x_test")
    y_test = arrays.get("y_test")
    return Source(arrays["x_train"], arrays["y_train"], about, x_test, y_test)


# --- files on disk -------------------------------------------------------------------------------


def _folder(root: str | os.PathLike | None, published: PublishedSet) -> Path:
    """The folder with the files, after a download where none is named."""
    root = root or os.environ.get("DATA_ROOT", "")
    if not root:
        download.download(published, download.DOWNLOADS)
        return download.DOWNLOADS
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root}: set DATA_ROOT to the folder with the data, or leave "
            "it empty."
        )
    return folder


def _read_digits(published: PublishedSet) -> Source:
    """The digits of scikit-learn, x (1797, 1, 8, 8) with whole numbers 0..16."""
    folder = Path(str(package_files("sklearn.datasets"))) / "data"
    files = PublishedFolder(folder, published)
    for file in published.files:
        files.read(file)
    digits = load_digits()
    x = digits.images[:, None].astype(np.uint8)
    y = digits.target.astype(np.int64)
    return Source(x, y, files.about("digits"), white=DIGITS_WHITE)


def _read_mnist(name: str, files: PublishedFolder) -> Source:
    train_images, train_labels, test_images, test_labels = files.published.files
    x, y = _idx_pair(train_images, train_labels, files)
    x_test, y_test = _idx_pair(test_images, test_labels, files)
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            "The training and the test images differ in size: fetch both files of images again."
        )
    return Source(x, y, files.about(name), x_test, y_test)


def _idx_pair(images: str, labels: str, files: PublishedFolder) -> Pair:
    """x (n, 1, H, W) uint8 and y (n,) int64."""
    x = parse_idx(files.read(images), images, ndim=3)
    y = parse_idx(files.read(labels), labels, ndim=1)
    if len(x) != len(y):
        raise ValueError(
            f"{images} has {len(x)} images and {labels} {len(y)} labels: fetch both again."
        )
    return x[:, None], _known_labels(y, labels, files)


def _read_cifar(name: str, files: PublishedFolder) -> Source:
    """The training batches that are there, at least one, and the test file where it is there."""
    label_bytes = 1 if name == "cifar10" else 2
    *batches, test_file = files.published.files
    present = [file for file in batches if files.has(file)]
    pairs = [_cifar_pair(file, files, label_bytes) for file in present or batches[:1]]
    x, y = map(np.concatenate, zip(*pairs))
    x_test = y_test = None
    note = ""
    if len(present) < len(batches):
        note = f"only {len(present)} of {len(batches)} training batches are present; "
    if files.has(test_file):
        x_test, y_test = _cifar_pair(test_file, files, label_bytes)
    else:
        note += (
            "the official test file is absent, so the held-out part comes from training images; "
        )
    return Source(x, y, files.about(name), x_test, y_test, note=note)


def _cifar_pair(file: str, files: PublishedFolder, label_bytes: int) -> Pair:
    x, y = parse_cifar(files.read(file), file, label_bytes)
    return x, _known_labels(y, file, files)


def _known_labels(y: np.ndarray, file: str, files: PublishedFolder) -> np.ndarray:
    largest = len(files.published.class_names) - 1
    if y.max() > largest:
        raise ValueError(
            f"{file} holds the label {y.max()}, beyond {largest}: delete it and fetch it again."
        )
    return y.astype(np.int64)


# --- a draw --------------------------------------------------------------------------------------


def _drawn(seed: int, n: int) -> Source:
    x, y = synthetic.synthetic_examples(n, synthetic.DATASET_STREAM, seed)
    about: dict = {
        "name": "synthetic",
        "source": f"{synthetic.CLASSES} Gaussian classes with fixed means and standard deviation "
        f"{synthetic.NOISE}, drawn by utils/data.py",
        "licence": "MIT, as this repository",
        "sha256": {},
        "matches_published": None,
        "class_names": [str(k) for k in range(synthetic.CLASSES)],
    }
    return Source(x, y, about)
