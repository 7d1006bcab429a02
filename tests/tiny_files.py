"""Tiny files in the real formats, a registry that publishes them, comparisons of data sets."""

import gzip
import hashlib
import json
import re
import struct
from functools import partial

import numpy as np
import pytest
import torch

from utils.data import load_dataset, published

PARTS = ("train", "calibration", "test")
MNIST = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz")
MNIST += ("t10k-labels-idx1-ubyte.gz",)
zipped = partial(
    gzip.compress, mtime=0
)  # without the time: test names hold the bytes, and workers have to agree


def images(n, shape, n_classes, seed=0):
    """Random bytes and balanced labels; all images differ."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(
        n, dtype=np.uint8
    ) % n_classes


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_mnist(root, name="mnist"):
    (root / name).mkdir(parents=True)
    train, test = images(60, (5, 5), 10), images(30, (5, 5), 10, seed=1)
    for file, array in zip(MNIST, train + test, strict=True):
        (root / name / file).write_bytes(zipped(idx(array)))
    return train, test


def cifar_records(x, y, coarse=None):
    head = [y[:, None]] if coarse is None else [coarse[:, None], y[:, None]]
    return np.concatenate([*head, x.reshape(len(x), -1)], axis=1).tobytes()


def write_cifar100(root):
    (root / "cifar-100-binary").mkdir(parents=True)
    for file, n in (("train.bin", 500), ("test.bin", 100)):
        x, y = images(n, (3, 32, 32), 100, seed=n)
        (root / "cifar-100-binary" / file).write_bytes(cifar_records(x, y, y // 5))


def write_cifar10(root, batches=(1, 2), test=True):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    made = [images(40, (3, 32, 32), 10, seed=b) for b in batches]
    for b, (x, y) in zip(batches, made, strict=True):
        (folder / f"data_batch_{b}.bin").write_bytes(cifar_records(x, y))
    held_out = images(20, (3, 32, 32), 10, seed=99)
    if test:
        (folder / "test_batch.bin").write_bytes(cifar_records(*held_out))
    return tuple(np.concatenate(parts) for parts in zip(*made, strict=True)), held_out


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def unscaled(x, top=255):
    """The bytes that were scaled, exactly."""
    back = (x.astype(float) + 1) * top / 2
    assert np.abs(back - back.round()).max() < 1e-4
    return back.round().astype(np.uint8)


def rows(x, y):
    """The examples as a sorted list of (bytes, label): equal lists mean equal sets."""
    return sorted((row.tobytes(), int(label)) for row, label in zip(np.asarray(x), y, strict=True))


def pool_rows(dataset, parts=PARTS, top=255):
    x, y = (
        np.concatenate([getattr(dataset, f"{v}_{part}").numpy() for part in parts]) for v in "xy"
    )
    return rows(unscaled(x, top), y)


def check_form(dataset):
    info = dataset.info
    assert json.loads(json.dumps(info)) == info
    for part in PARTS:
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert len(x) == len(y) == info["sizes"][part] > 0
        assert list(x.shape[1:]) == info["input_shape"]
        assert 0 <= y.min() and y.max() < info["n_classes"]
        assert torch.isfinite(x).all()


def equal(a, b):
    return all(
        torch.equal(getattr(a, f"{v}_{p}"), getattr(b, f"{v}_{p}")) for v in "xy" for p in PARTS
    )


def refused(message, name, root=None, error=ValueError, **arguments):
    """`load_dataset` raises `error` with one sentence that contains `message`."""
    with pytest.raises(error, match=message) as caught:
        load_dataset(name, root, **arguments)
    text = str(caught.value)
    assert (
        "\n" not in text
        and text.endswith(".")
        and ": " in text
        and not re.search(r"\. [A-Z]", text)
    )
    assert caught.value.__cause__ is None and (
        caught.value.__context__ is None or caught.value.__suppress_context__
    )


# --- published files -----------------------------------------------------------------------------


def publish(monkeypatch, tmp_path, root, *names, mirrors=(), archive_hash=None):
    """A registry in which the files of these sets under `root` are the published ones."""
    registry = json.loads(published.REGISTRY.read_text())
    for name in names:
        registry[name]["mirrors"] = list(mirrors)
        if "archive" in registry[name]:
            registry[name]["archive_hash"] = archive_hash
        for file, expected in registry[name]["files"].items():
            content = published.uncompressed((root / file).read_bytes(), file)
            expected |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    monkeypatch.setattr(published, "REGISTRY", tmp_path / "registry.json")


CIFAR10 = [
    f"cifar-10-batches-bin/{b}.bin"
    for b in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
]
SWAPS = {
    "train and test images": ("mnist", f"mnist/{MNIST[0]}", f"mnist/{MNIST[2]}"),
    "train and test labels": ("mnist", f"mnist/{MNIST[1]}", f"mnist/{MNIST[3]}"),
    "images and labels": ("mnist", f"mnist/{MNIST[0]}", f"mnist/{MNIST[1]}"),
    "batch and test": ("cifar10", CIFAR10[0], CIFAR10[5]),
    "two batches": ("cifar10", CIFAR10[1], CIFAR10[2]),
    "100 for 10": ("cifar10", CIFAR10[5], "cifar-100-binary/test.bin"),
    "10 for 100": ("cifar100", "cifar-100-binary/test.bin", CIFAR10[5]),
    "train and test of 100": (
        "cifar100",
        "cifar-100-binary/train.bin",
        "cifar-100-binary/test.bin",
    ),
}


def write_all(root):
    write_mnist(root)
    write_cifar10(root, batches=(1, 2, 3, 4, 5))
    write_cifar100(root)
