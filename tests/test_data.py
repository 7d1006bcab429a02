"""The readers on tiny files in the real formats, the split, and every bad input with its message. No network."""

import errno
import gzip
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import data
from utils.data import load_dataset, synthetic_draw, synthetic_teacher

PARTS = ("train", "calibration", "test")
MNIST = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz")
MNIST += ("t10k-labels-idx1-ubyte.gz",)
zipped = partial(gzip.compress, mtime=0)  # without the time: test names hold the bytes, and workers have to agree


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "downloads")


def images(n, shape, n_classes, seed=0):
    """Random bytes and balanced labels; all images differ."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.uint8) % n_classes


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


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
    """The samples as a sorted list of (bytes, label): equal lists mean equal sets of labelled samples."""
    return sorted((row.tobytes(), int(label)) for row, label in zip(np.asarray(x), y, strict=True))


def pool_rows(dataset, parts=PARTS, top=255):
    x, y = (np.concatenate([getattr(dataset, f"{v}_{part}").numpy() for part in parts]) for v in "xy")
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
    return all(torch.equal(getattr(a, f"{v}_{p}"), getattr(b, f"{v}_{p}")) for v in "xy" for p in PARTS)


# --- round trips -----------------------------------------------------------------------------------


def test_digits_are_scikit_learns_to_the_last_grey_level():
    from sklearn.datasets import load_digits

    dataset, digits = load_dataset("digits"), load_digits()
    check_form(dataset)
    assert dataset.info["input_shape"] == [1, 8, 8]
    assert (dataset.x_train.min(), dataset.x_train.max()) == (-1, 1)
    assert pool_rows(dataset, top=16) == rows(digits.images.astype(np.uint8), digits.target)
    assert dataset.info["sizes"] == {"train": 1079, "calibration": 359, "test": 359}
    assert dataset.info["matches_published"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_round_trip(tmp_path, name):
    train, test = write_mnist(tmp_path, name)
    dataset = load_dataset(name, tmp_path)
    check_form(dataset)
    assert dataset.info["input_shape"] == [1, 5, 5]
    assert pool_rows(dataset, ("train", "calibration")) == rows(*train)
    assert pool_rows(dataset, ("test",)) == rows(*test)
    assert dataset.info["sizes"] == {"train": 48, "calibration": 12, "test": 30}
    assert dataset.y_test.tolist() != test[1].tolist()  # in random order, as the other parts
    for file, digest in dataset.info["sha256"].items():
        assert digest == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    assert len(dataset.info["sha256"]) == 4
    assert not dataset.info["matches_published"]


def test_cifar10_round_trip(tmp_path):
    train, test = write_cifar10(tmp_path, batches=(1, 2, 3, 4, 5))
    dataset = load_dataset("cifar10", tmp_path)
    check_form(dataset)
    assert pool_rows(dataset, ("train", "calibration")) == rows(*train)
    assert pool_rows(dataset, ("test",)) == rows(*test)
    assert dataset.info["split"].startswith("The pool") and "official test set (20 samples)" in dataset.info["split"]


def test_cifar10_with_two_batches_and_no_test_file_says_so(tmp_path):
    train, _ = write_cifar10(tmp_path, batches=(2, 4), test=False)
    dataset = load_dataset("cifar10", tmp_path)
    check_form(dataset)
    assert pool_rows(dataset) == rows(*train)
    assert dataset.info["sizes"] == {"train": 48, "calibration": 16, "test": 16}
    assert "nly 2 of 5 training batches" in dataset.info["split"]
    assert "official test file is absent" in dataset.info["split"]


@pytest.mark.parametrize("with_test", [True, False])
def test_cifar100_uses_the_fine_label(tmp_path, with_test):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    x, y = images(500, (3, 32, 32), 100)
    coarse = y // 5
    (folder / "train.bin").write_bytes(cifar_records(x, y, coarse))
    if with_test:
        (folder / "test.bin").write_bytes(cifar_records(x[:9], y[:9], coarse[:9]))
    dataset = load_dataset("cifar100", tmp_path)
    check_form(dataset)
    assert dataset.info["n_classes"] == len(dataset.info["class_names"]) == 100
    assert pool_rows(dataset, ("train", "calibration") if with_test else PARTS) == rows(x, y)
    assert dataset.info["sizes"]["test"] == (9 if with_test else 100)
    assert dataset.info["duplicates_across_parts"] == (9 if with_test else 0)
    assert "training batches" not in dataset.info["split"]


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 6, 6)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_keeps_floats(tmp_path, shape, dtype):
    x = np.random.default_rng(0).normal(0, 30, (40, *shape)).astype(dtype)
    y = np.arange(40) % 4
    dataset = load_dataset(write_npz(tmp_path / "mine.npz", x_train=x, y_train=y))
    check_form(dataset)
    merged = [np.concatenate([getattr(dataset, f"{v}_{p}").numpy() for p in PARTS]) for v in "xy"]
    assert rows(*merged) == rows(x.astype(np.float32), y)
    assert dataset.info["name"] == "npz:mine.npz" and dataset.info["class_names"] is None
    assert str(tmp_path) not in json.dumps(dataset.info)


@pytest.mark.parametrize("label_type", [np.uint8, np.int16, np.uint64])
def test_npz_scales_uint8_and_holds_its_test_set_out(tmp_path, label_type):
    (x, y), (x_test, y_test) = images(60, (1, 4, 4), 3), images(9, (1, 4, 4), 3, seed=1)
    y = y.astype(label_type)
    name = write_npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    dataset = load_dataset(name)
    check_form(dataset)
    assert pool_rows(dataset, ("train", "calibration")) == rows(x, y)
    assert pool_rows(dataset, ("test",)) == rows(x_test, y_test)


# --- the split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("fractions", [(0.2, 0.2), (0.1, 0.35)])
def test_split_is_a_stratified_partition(seed, fractions):
    y = np.repeat([0, 1, 2], [200, 90, 31])
    parts = data.split(y, *fractions, np.random.RandomState(seed))
    together = np.concatenate(parts)
    assert len(set(together)) == len(together) == len(y)
    for part, share in zip(parts, (1 - sum(fractions), *fractions), strict=True):
        assert abs(len(part) - share * len(y)) <= 1.5
        np.testing.assert_allclose(np.bincount(y[part]), share * np.bincount(y), atol=1.5)
        assert not np.array_equal(part, np.sort(part))  # the order inside a part is random


def test_split_without_a_test_part_uses_every_row():
    y = np.arange(50) % 5
    train, calibration, test = data.split(y, 0.2, None, np.random.RandomState(0))
    assert (len(train), len(calibration), len(test)) == (40, 10, 0)
    assert set(train) | set(calibration) == set(range(50))


def test_same_seed_same_data_and_another_seed_another_split(tmp_path):
    write_mnist(tmp_path)
    for name in ("digits", "mnist", "synthetic"):
        first = load_dataset(name, tmp_path, seed=3)
        torch.rand(5), np.random.rand(5)  # the global generators do not matter
        assert equal(first, load_dataset(name, tmp_path, seed=3))
        assert not torch.equal(first.y_train, load_dataset(name, tmp_path, seed=4).y_train)


def test_subset_is_stratified_and_leaves_the_official_test_set(tmp_path):
    train, test = write_mnist(tmp_path)
    dataset = load_dataset("mnist", tmp_path, n_samples=50)
    assert dataset.info["sizes"] == {"train": 40, "calibration": 10, "test": 30}
    kept = pool_rows(dataset, ("train", "calibration"))
    assert set(kept) <= set(rows(*train)) and len(set(kept)) == 50
    assert pool_rows(dataset, ("test",)) == rows(*test)
    labels = torch.cat([dataset.y_train, dataset.y_calibration])
    assert labels.bincount().tolist() == [5] * 10
    assert "stratified subset of 50" in dataset.info["split"]
    everything = load_dataset("mnist", tmp_path, n_samples=60)
    assert everything.info["sizes"] == load_dataset("mnist", tmp_path).info["sizes"]


@pytest.mark.parametrize("official", [True, False])
def test_the_published_order_is_kept_part_by_part(tmp_path, official):
    """The same samples train and calibrate with and without a test set, for which the next are held out otherwise."""
    x, y = images(60, (1, 4, 4), 3)
    extra = dict(zip(("x_test", "y_test"), images(9, (1, 4, 4), 3, seed=1), strict=True)) if official else {}
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, **extra)
    options = {"order": "published", "n_samples": 50, "calibration_fraction": 0.2, "test_fraction": 0.1}
    dataset = load_dataset(f"npz:{tmp_path / 'mine.npz'}", **options)
    ends = [0, 40, 50] if official else [0, 40, 50, 55]
    scaled = [tuple(v.reshape(-1).astype(np.float32) / np.float32(127.5) - np.float32(1)) for v in x]
    for part, (a, b) in zip(PARTS, itertools.pairwise(ends), strict=False):
        found = [tuple(v.numpy().reshape(-1)) for v in getattr(dataset, f"x_{part}")]
        assert sorted(found) == sorted(scaled[a:b]) and found != scaled[a:b]
    kept = f"the first {ends[-1]} samples split in the published order"
    assert kept in dataset.info["split"].lower() and dataset.info["sizes"]["test"] == (9 if official else 5)
    assert not torch.equal(dataset.y_train, load_dataset(f"npz:{tmp_path / 'mine.npz'}", seed=1, **options).y_train)


def test_too_many_samples_in_the_published_order(tmp_path):
    x, y = images(60, (1, 4, 4), 3)
    name = write_npz(tmp_path / "d.npz", x_train=x, y_train=y)
    options = {"order": "published", "test_fraction": 0.1}
    assert load_dataset(name, n_samples=54, **options).info["sizes"]["test"] == 5
    with pytest.raises(ValueError, match=r"n_samples is 56 with 6 held out after them: choose at most 60 together\.$"):
        load_dataset(name, n_samples=56, **options)


def test_duplicates_across_parts_are_counted(tmp_path):
    x, y = images(60, (1, 4, 4), 3)
    x_test, y_test = images(10, (1, 4, 4), 3, seed=1)
    x_test[:4] = x[:4]
    name = write_npz(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    assert load_dataset(name).info["duplicates_across_parts"] == 4
    constant = np.zeros((20, 3))
    name = write_npz(tmp_path / "c.npz", x_train=constant, y_train=np.arange(20) % 2)
    assert load_dataset(name).info["duplicates_across_parts"] == 8  # every calibration and held-out sample
    assert load_dataset("digits").info["duplicates_across_parts"] == 0


# --- synthetic -------------------------------------------------------------------------------------


def test_synthetic_teacher_is_the_posterior_of_the_population():
    """p(y | x) by Bayes' rule from the densities, and calibration of the teacher on fresh draws."""
    x, y = synthetic_draw(40_000, seed=0)
    p = synthetic_teacher(x).softmax(1)
    means = torch.from_numpy(data._synthetic_means()).flatten(1)
    density = torch.distributions.Normal(means[None, :20], data.SYNTHETIC_NOISE)
    log_density = density.log_prob(x[:500, None].flatten(2).double()).sum(2)
    torch.testing.assert_close(p[:500], log_density.softmax(1))
    error = (p - torch.nn.functional.one_hot(y, p.shape[1])).mean(0)
    assert error.abs().max() < 5 * 0.5 / len(y) ** 0.5
    fraction = p.gather(1, y[:, None]).mean()  # E p_y = E sum_k p_k^2 where the labels follow the teacher
    assert abs(fraction - p.square().sum(1).mean()) < 5 * 0.5 / len(y) ** 0.5


def test_synthetic_draws_are_fresh_and_sized():
    dataset = load_dataset("synthetic", seed=5, n_samples=500)
    check_form(dataset)
    assert sum(dataset.info["sizes"].values()) == 500
    x, _ = synthetic_draw(500, seed=5)
    assert not set(map(bytes, x.numpy())) & set(map(bytes, dataset.x_train.numpy()))
    assert torch.equal(x, synthetic_draw(500, seed=5)[0])
    assert not torch.equal(x, synthetic_draw(500, seed=6)[0])


# --- bad input -------------------------------------------------------------------------------------


def refused(message, name, root=None, error=ValueError, **arguments):
    """`load_dataset` raises `error` with one sentence that contains `message`."""
    with pytest.raises(error, match=message) as caught:
        load_dataset(name, root, **arguments)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ": " in text and not re.search(r"\. [A-Z]", text)
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)


def test_unknown_name_lists_the_known():
    for name in ("mnsit", "", None, 3, "../x"):
        refused("choose digits, mnist, fashion_mnist, cifar10, cifar100, synthetic, or npz:PATH", name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": True}, "seed is True"),
        ({"n_samples": -3}, "n_samples is -3"),
        ({"n_samples": 1800}, "n_samples is 1800: choose 10 to 1787, or 0 for all 1797"),
        ({"n_samples": 1790}, "choose 10 to 1787"),
        ({"n_samples": 12}, "raise n_samples"),
        ({"calibration_fraction": 0}, "calibration_fraction is 0"),
        ({"calibration_fraction": 1.0}, "calibration_fraction is 1.0"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
        ({"test_fraction": "0.2"}, "test_fraction is '0.2'"),
        ({"calibration_fraction": 0.6, "test_fraction": 0.4}, "sum below 1"),
        ({"calibration_fraction": 0.001}, "calibration part would have 2 of 1797 samples"),
        ({"test_fraction": 0.0001}, "test part would have 0 of 1797 samples"),
        ({"calibration_fraction": 0.5, "test_fraction": 0.4999}, "train part would have 1 of 1797"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    refused(message, "digits", **arguments)


def test_missing_folders_and_files(tmp_path, monkeypatch):
    refused("no folder .*nowhere", "mnist", tmp_path / "nowhere", FileNotFoundError)
    refused("no file mnist/train-images-idx3-ubyte.gz", "mnist", tmp_path, FileNotFoundError)
    refused("no file cifar-10-batches-bin/data_batch_1.bin", "cifar10", tmp_path, FileNotFoundError)
    refused("no file cifar-100-binary/train.bin", "cifar100", tmp_path, FileNotFoundError)
    refused("no file .*gone.npz", f"npz:{tmp_path}/gone.npz", None, FileNotFoundError)
    refused("no file ''", "npz:", None, FileNotFoundError)
    refused("no file", f"npz:{tmp_path}", None, FileNotFoundError)
    write_mnist(tmp_path)
    (tmp_path / "mnist" / MNIST[3]).unlink()
    refused("no file mnist/t10k-labels-idx1-ubyte.gz", "mnist", tmp_path, FileNotFoundError)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "elsewhere"))
    refused("no folder .*elsewhere", "mnist", "", FileNotFoundError)


def test_data_root_is_used_where_no_root_is_given(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert equal(load_dataset("mnist"), load_dataset("mnist", tmp_path))
    assert equal(load_dataset("mnist", ""), load_dataset("mnist", tmp_path))


def good_idx(shape=(60, 5, 5)):
    return idx(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "file, content, message",
    [
        (0, zipped(good_idx())[:-12], "train-images.* is truncated or not a gzip"),
        (0, good_idx(), "train-images.* is truncated or not a gzip"),
        (0, b"", "train-images.*(truncated|not an idx)"),
        (0, zipped(b"\x00\x00\x08\x03\x00"), "train-images.* is not an idx file of images"),
        (0, zipped(good_idx((60,))), "train-images.* is not an idx file of images"),
        (0, zipped(good_idx()[:-1]), "holds 1515 bytes where its header announces 1516"),
        (0, zipped(good_idx() + b"x"), "holds 1517 bytes where its header announces 1516"),
        (0, zipped(good_idx((0, 5, 5))), "holds 16 bytes where its header"),
        (0, zipped(bytes([0, 0, 8, 3]) + b"\xff" * 12), "holds 16 bytes where its header announces"),
        (0, zipped(good_idx((59, 5, 5))), "has 59 images and .* 60 labels"),
        (0, zipped(good_idx((60, 5, 6))), "differ in size"),
        (1, zipped(good_idx()), "train-labels.* is not an idx file of labels"),
        (1, zipped(idx(np.full(60, 10, np.uint8))), "train-labels.* holds the label 10, beyond 9"),
        (1, zipped(idx(np.arange(60, dtype=np.uint8) % 9)), "Class 9 of 0 to 9 has 0 samples"),
        (3, zipped(idx(np.full(30, 200, np.uint8))), "t10k-labels.* holds the label 200"),
    ],
)
def test_damaged_idx_files(tmp_path, file, content, message):
    write_mnist(tmp_path)
    (tmp_path / "mnist" / MNIST[file]).write_bytes(content)
    refused(message, "mnist", tmp_path)


def test_flipped_bit_in_a_gzip_stream(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "mnist" / MNIST[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    refused("truncated or not a gzip", "mnist", tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: c[:-1], "not a multiple of 3073"),
        (lambda c: b"", "holds 0 bytes"),
        (lambda c: b"\x0a" + c[1:], "label 10, beyond 9"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_2.bin", "test_batch.bin"])
def test_damaged_cifar_files(tmp_path, file, damage, message):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / file
    path.write_bytes(damage(path.read_bytes()))
    refused(f"{file} holds.*{message.removeprefix('holds ')}", "cifar10", tmp_path)


X, Y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3


def spoiled(value):
    x = X.copy()
    x[7, 2] = value
    return x


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"y_train": Y}, "has no array x_train"),
        ({"x_train": X}, "has no array y_train"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "only one of x_test and y_test"),
        ({"x_train": spoiled(np.nan), "y_train": Y}, "x_train in bad.npz has NaN .* in 1 of 30 samples"),
        ({"x_train": spoiled(-np.inf), "y_train": Y}, "NaN or values beyond float32 in 1 of 30"),
        ({"x_train": spoiled(1e300), "y_train": Y}, "NaN or values beyond float32 in 1 of 30"),
        ({"x_train": X, "y_train": Y, "x_test": spoiled(np.nan), "y_test": Y}, "x_test in bad.npz has NaN"),
        ({"x_train": X, "y_train": Y.astype(float)}, "y_train in bad.npz has dtype float64: give integer labels"),
        ({"x_train": X, "y_train": Y > 0}, "y_train in bad.npz has dtype bool"),
        ({"x_train": X, "y_train": Y.astype(str)}, "y_train in bad.npz has dtype <U"),
        ({"x_train": X, "y_train": Y[:, None]}, r"y_train in bad.npz has shape \(30, 1\)"),
        ({"x_train": X, "y_train": Y - 1}, "negative label -1"),
        ({"x_train": X, "y_train": Y * 2}, "Class 1 of 0 to 4 has 0 samples.*without gaps"),
        ({"x_train": X, "y_train": Y + 1}, "Class 0 of 0 to 3 has 0 samples.*without gaps"),
        ({"x_train": X, "y_train": Y + 10**12}, "holds the label 10000000000"),
        ({"x_train": X, "y_train": Y * 0}, "single class"),
        ({"x_train": X, "y_train": np.r_[Y[:28] % 2, 2, 2]}, "Class 2 of 0 to 2 has 2 samples, fewer than the 3"),
        ({"x_train": X[:29], "y_train": Y}, "x_train in bad.npz has 29 samples and y_train 30 labels"),
        ({"x_train": X[:, 0], "y_train": Y}, r"x_train in bad.npz has shape \(30,\)"),
        ({"x_train": X[:0], "y_train": Y[:0]}, r"x_train in bad.npz has shape \(0, 4\)"),
        ({"x_train": X.astype(int), "y_train": Y}, "x_train in bad.npz has dtype int64: give floats"),
        ({"x_train": X + 1j, "y_train": Y}, "x_train in bad.npz has dtype complex128"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y}, "give both the same type and shape"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1}, "y_test holds the label 3"),
        ({"x_train": X.astype(object), "y_train": Y}, "holds pickled objects"),
        ({"x_train": X, "y_train": Y.astype(object)}, "holds pickled objects"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    refused(message, write_npz(tmp_path / "bad.npz", **arrays))


def test_files_that_are_no_npz(tmp_path):
    whole = io.BytesIO()
    np.savez_compressed(whole, x_train=X, y_train=Y)
    whole = whole.getvalue()
    single = io.BytesIO()
    np.save(single, X)
    pickled = pickle.dumps({"x_train": X, "y_train": Y})
    flipped = bytearray(whole)
    flipped[200] ^= 1
    for content in (whole[:-30], whole[:60], b"", b"hello", pickled, single.getvalue(), bytes(flipped)):
        (tmp_path / "no.npz").write_bytes(content)
        refused("no.npz is truncated or not an .npz archive", f"npz:{tmp_path}/no.npz")


def test_a_pickle_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    name = write_npz(tmp_path / "bad.npz", x_train=np.array([Trap()], dtype=object), y_train=Y)
    refused("holds pickled objects", name)
    assert not (tmp_path / "executed").exists()


# --- published files: none stands in for another ------------------------------------------------------


def publish(monkeypatch, tmp_path, root, *names, mirrors=()):
    """A registry in which the files of these sets under `root` are the published ones."""
    registry = json.loads(data.REGISTRY.read_text())
    for name in names:
        registry[name]["mirrors"] = list(mirrors)
        for file, published in registry[name]["files"].items():
            content = data._uncompressed((root / file).read_bytes(), file)
            published |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    monkeypatch.setattr(data, "REGISTRY", tmp_path / "registry.json")


CIFAR10 = [f"cifar-10-batches-bin/{b}.bin" for b in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
SWAPS = {
    "train and test images": ("mnist", f"mnist/{MNIST[0]}", f"mnist/{MNIST[2]}"),
    "train and test labels": ("mnist", f"mnist/{MNIST[1]}", f"mnist/{MNIST[3]}"),
    "images and labels": ("mnist", f"mnist/{MNIST[0]}", f"mnist/{MNIST[1]}"),
    "batch and test": ("cifar10", CIFAR10[0], CIFAR10[5]),
    "two batches": ("cifar10", CIFAR10[1], CIFAR10[2]),
    "100 for 10": ("cifar10", CIFAR10[5], "cifar-100-binary/test.bin"),
    "10 for 100": ("cifar100", "cifar-100-binary/test.bin", CIFAR10[5]),
    "train and test of 100": ("cifar100", "cifar-100-binary/train.bin", "cifar-100-binary/test.bin"),
}


def write_all(root):
    write_mnist(root)
    write_cifar10(root, batches=(1, 2, 3, 4, 5))
    write_cifar100(root)


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_published_files_are_refused_on_disk(tmp_path, monkeypatch, swap):
    name, file, other = SWAPS[swap]
    write_all(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", "cifar10", "cifar100")
    assert load_dataset(name, tmp_path / "disk").info["matches_published"]
    a, b = (tmp_path / "disk" / f for f in (file, other))
    content, other_content = a.read_bytes(), b.read_bytes()
    a.write_bytes(other_content), b.write_bytes(content)
    refused(f"holds what is published as ({other}|{file}): put", name, tmp_path / "disk")
    b.write_bytes(other_content)  # a copy in the place of another
    refused(f"{file} holds what is published as {other}: put", name, tmp_path / "disk")


@pytest.mark.parametrize("name, file", [("mnist", f"mnist/{MNIST[1]}"), ("cifar10", CIFAR10[2])])
def test_one_changed_byte_of_a_published_file_is_refused(tmp_path, monkeypatch, name, file):
    write_all(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", "cifar10")
    path = tmp_path / "disk" / file
    content = bytearray(data._uncompressed(path.read_bytes(), file))
    content[-1] = (content[-1] + 1) % 2  # a label or a pixel that the format allows
    path.write_bytes(gzip.compress(bytes(content)) if file.endswith(".gz") else bytes(content))
    refused(f"{file} has the published length and another content: delete it and fetch it again", name, path.parents[1])


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path, monkeypatch):
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist")
    (tmp_path / "disk" / "mnist").rename(tmp_path / "disk" / "fashion_mnist")
    refused("fashion_mnist/train-images.* published as mnist/train-images", "fashion_mnist", tmp_path / "disk")


@pytest.mark.parametrize("name, other", [("cifar10", "cifar100"), ("cifar100", "cifar10")])
def test_selections_of_one_cifar_are_no_file_of_the_other(tmp_path, name, other):
    write_all(tmp_path)
    files = {"cifar10": CIFAR10[0], "cifar100": "cifar-100-binary/train.bin"}
    shutil.copy(tmp_path / files[other], tmp_path / files[name])
    refused("not a multiple of", name, tmp_path)


# --- downloads, from a server on this machine --------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two mirrors: their folders, their addresses, and the list of what has been asked for."""
    folders = [tmp_path / "served" / m for m in "ab"]
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    for folder in folders:
        folder.mkdir(parents=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "*")
        yield folders, [f"http://127.0.0.1:{httpd.server_address[1]}/{m}/" for m in "ab"], asked
        httpd.shutdown()


def cached():
    """The files in the cache; the folder in which downloads are checked has to be gone."""
    assert not data.DOWNLOADS.with_suffix(".tmp").exists()
    found = sorted(str(p.relative_to(data.DOWNLOADS)) for p in data.DOWNLOADS.rglob("*") if p.is_file())
    return [file for file in found if file != ".lock"]


def archive(path, root, files, level=9):
    """A .tar.gz of `files` (name in the archive: file under root)."""
    with tarfile.open(path, "w:gz", compresslevel=level) as tar:
        for name, file in files.items():
            tar.add(root / file, name)


BAD_FILES = {
    "absent": lambda good: None,
    "truncated": lambda good: good[:-1],
    "corrupt": lambda good: good[:30] + bytes([good[30] ^ 1]) + good[31:],
    "other content": lambda good: zipped(gzip.decompress(good)[:-1] + b"\7"),
    "not compressed": gzip.decompress,
    "a page": lambda good: b"<html>Please log in</html>",
    "empty": lambda good: b"",
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_mirror_is_passed_over_and_nothing_of_it_is_cached(server, tmp_path, monkeypatch, capsys, bad):
    (first, second), urls, asked = server
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", mirrors=urls)
    for file in MNIST:
        good = (tmp_path / "disk/mnist" / file).read_bytes()
        (first / file).write_bytes(good)
        (second / file).write_bytes(gzip.compress(gzip.decompress(good), 1))  # packed anew: the content counts
    spoiled = BAD_FILES[bad]((first / MNIST[1]).read_bytes())
    (first / MNIST[1]).write_bytes(spoiled) if spoiled is not None else (first / MNIST[1]).unlink()
    (second / MNIST[1]).rename(tmp_path / "kept")
    refused(
        f"{MNIST[1]} could not be downloaded from {urls[0]}{MNIST[1]} .* or {urls[1]}{MNIST[1]} .HTTPError.: check the "
        f"network, or put mnist/{MNIST[1]}, mnist/{MNIST[2]}, mnist/{MNIST[3]} into {data.DOWNLOADS}, or set DATA_ROOT",
        "mnist",
        error=FileNotFoundError,
    )
    assert cached() == [f"mnist/{MNIST[0]}"]

    (tmp_path / "kept").rename(second / MNIST[1])
    asked.clear()
    dataset = load_dataset("mnist")
    assert asked == [f"/a/{MNIST[1]}", f"/b/{MNIST[1]}", f"/a/{MNIST[2]}", f"/a/{MNIST[3]}"]  # the first was kept
    assert equal(dataset, load_dataset("mnist", tmp_path / "disk")) and dataset.info["matches_published"]
    assert cached() == sorted(f"mnist/{file}" for file in MNIST)
    assert re.search(f"Downloading {urls[1]}{MNIST[1]}\\n.*100%", capsys.readouterr().err)  # the progress bar

    asked.clear()
    assert equal(dataset, load_dataset("mnist")) and not asked
    (data.DOWNLOADS / "mnist" / MNIST[3]).write_bytes(b"altered")
    assert equal(dataset, load_dataset("mnist")) and asked == [f"/a/{MNIST[3]}"]


@pytest.mark.parametrize("swap", [swap for swap, files in SWAPS.items() if files[0] == "mnist"])
def test_swapped_files_of_a_mirror_are_not_cached(server, tmp_path, monkeypatch, swap):
    (first, _), urls, _ = server
    _, file, other = SWAPS[swap]
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", mirrors=urls)
    shutil.copytree(tmp_path / "disk/mnist", first, dirs_exist_ok=True)
    shutil.copy(tmp_path / "disk" / file, first / Path(other).name)
    shutil.copy(tmp_path / "disk" / other, first / Path(file).name)
    refused("its mnist/.* has not the published checksum", "mnist", error=FileNotFoundError)
    assert file not in cached() and other not in cached()


def test_a_full_disk_is_not_taken_for_the_network(server, tmp_path, monkeypatch):
    (first, _), urls, asked = server
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", mirrors=urls)
    shutil.copytree(tmp_path / "disk/mnist", first, dirs_exist_ok=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(OSError, match=r"cannot hold train-images.* \(No space left on device\): make room in it\.$"):
        load_dataset("mnist")
    assert len(asked) == 1 and not cached()  # the second mirror would not help


BAD_ARCHIVES = {
    "truncated": lambda path, root: path.write_bytes(path.read_bytes()[:-5000]),
    "a page": lambda path, root: path.write_bytes(b"<html>Please log in</html>"),
    "lacks a file": lambda path, root: archive(path, root, {f: f for f in CIFAR10[:-1]}),
    "holds the other set": lambda path, root: archive(path, root, {"cifar-100-binary": "cifar-100-binary"}),
    "swapped": lambda path, root: archive(path, root, {f: CIFAR10[i - 1] for i, f in enumerate(CIFAR10)}),
    "a folder for a file": lambda path, root: archive(path, root, {f: "cifar-10-batches-bin" for f in CIFAR10}),
}


@pytest.mark.parametrize("bad", BAD_ARCHIVES)
def test_a_bad_archive_is_passed_over(server, tmp_path, monkeypatch, bad):
    folders, urls, asked = server
    write_all(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "cifar10", "cifar100", mirrors=urls)
    for folder in folders:
        archive(folder / "cifar-10-binary.tar.gz", tmp_path / "disk", {f: f for f in CIFAR10})
    BAD_ARCHIVES[bad](folders[0] / "cifar-10-binary.tar.gz", tmp_path / "disk")
    (folders[1] / "cifar-10-binary.tar.gz").rename(tmp_path / "kept")
    refused("cifar-10-binary.tar.gz could not .* put .*test_batch.bin into", "cifar10", error=FileNotFoundError)
    for file in cached():
        assert (data.DOWNLOADS / file).read_bytes() == (tmp_path / "disk" / file).read_bytes()

    (tmp_path / "kept").rename(folders[1] / "cifar-10-binary.tar.gz")
    dataset = load_dataset("cifar10")
    assert equal(dataset, load_dataset("cifar10", tmp_path / "disk")) and dataset.info["matches_published"]
    assert cached() == CIFAR10
    asked.clear()
    assert equal(dataset, load_dataset("cifar10")) and not asked


def test_cifar100_out_of_an_archive_packed_anew(server, tmp_path, monkeypatch):
    (first, _), urls, _ = server
    write_cifar100(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "cifar100", mirrors=urls)
    archive(first / "cifar-100-binary.tar.gz", tmp_path / "disk", {"cifar-100-binary": "cifar-100-binary"}, level=1)
    dataset = load_dataset("cifar100")
    assert equal(dataset, load_dataset("cifar100", tmp_path / "disk")) and dataset.info["matches_published"]


def test_without_a_network_one_sentence_says_what_to_put_where(tmp_path, monkeypatch):
    write_all(tmp_path / "disk")
    monkeypatch.setenv("NO_PROXY", "*")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", "cifar10", mirrors=["http://127.0.0.1:9/a/"])
    missing = ", ".join(f"mnist/{file}" for file in MNIST)
    refused(f"train-images.* .ConnectionError.: .*put {missing} into {data.DOWNLOADS}", "mnist", "", FileNotFoundError)
    refused(f"ConnectionError.: .*put {', '.join(CIFAR10)} into", "cifar10", "", FileNotFoundError)
    assert cached() == []
    shutil.copytree(tmp_path / "disk" / "mnist", data.DOWNLOADS / "mnist")
    assert equal(load_dataset("mnist"), load_dataset("mnist", tmp_path / "disk"))
    (tmp_path / "a file").touch()
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "a file" / "downloads")
    refused("downloads cannot be written .Not a directory.: make it writable", "mnist", error=OSError)


def test_a_killed_download_leaves_nothing_unverified(server, tmp_path, monkeypatch):
    (first, _), urls, asked = server
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", mirrors=urls)
    shutil.copytree(tmp_path / "disk/mnist", first, dirs_exist_ok=True)
    half_sent, go_on = threading.Event(), threading.Event()

    def copyfile(self, source, target):
        content = source.read()
        if self.path == f"/a/{MNIST[1]}" and not go_on.is_set():
            target.write(content[:-1])
            half_sent.set()
            go_on.wait()
        else:
            target.write(content)

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", copyfile)
    child = multiprocessing.get_context("fork").Process(target=load_dataset, args=("mnist",))
    child.start()
    assert half_sent.wait(60)
    child.kill()
    child.join()
    scratch = data.DOWNLOADS.with_suffix(".tmp")
    assert [p.name for p in scratch.iterdir() if p.name == MNIST[1]]
    scratch.rename(tmp_path / "aside")
    assert cached() == [f"mnist/{MNIST[0]}"]
    (tmp_path / "aside").rename(scratch)

    go_on.set()
    asked.clear()
    assert equal(load_dataset("mnist"), load_dataset("mnist", tmp_path / "disk"))
    assert len(asked) == 3 and len(cached()) == 4


def test_of_several_at_once_one_downloads(server, tmp_path, monkeypatch):
    (first, _), urls, asked = server
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", mirrors=urls)
    shutil.copytree(tmp_path / "disk/mnist", first, dirs_exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(load_dataset, ["mnist"] * 4))
    assert all(equal(dataset, datasets[0]) for dataset in datasets)
    assert asked == [f"/a/{file}" for file in MNIST]


# --- what is committed, and what is on this machine --------------------------------------------------


def test_registry_is_complete():
    registry = json.loads(data.REGISTRY.read_text())
    assert set(registry) == set(data.NAMES) - {"synthetic"}
    for entry in registry.values():
        assert entry["source"] and entry["licence"] and entry["class_names"]
        assert all(re.fullmatch("[0-9a-f]{64}", p["sha256"]) and p["bytes"] > 0 for p in entry["files"].values())
    for name in set(registry) - {"digits"}:
        assert len(registry[name]["mirrors"]) >= 2 and all(mirror.endswith("/") for mirror in registry[name]["mirrors"])


def test_readme_of_the_data_agrees_with_the_registry():
    readme = (data.ROOT / "data" / "README.md").read_text()
    for entry in json.loads(data.REGISTRY.read_text()).values():
        for file, published in entry["files"].items():
            assert f"| `{file}` | {published['bytes']:,} | `{published['sha256']}` |" in readme
        for mirror in entry.get("mirrors", ()):
            assert mirror in readme


def files_on_this_machine():
    root = Path(os.environ.get("DATA_ROOT") or "/nonexistent")
    folders = {"mnist": "mnist", "fashion_mnist": "fashion_mnist", "cifar10": "cifar-10-batches-bin"}
    return root, [
        name for name, folder in (folders | {"cifar100": "cifar-100-binary"}).items() if (root / folder).is_dir()
    ]


FOUND_ROOT, FOUND = files_on_this_machine()


@pytest.mark.parametrize("name", ["digits", *FOUND])
def test_real_files(name):
    """The digits always; the others where DATA_ROOT holds them."""
    dataset = load_dataset(name, FOUND_ROOT if name in FOUND else None)
    check_form(dataset)
    assert (dataset.x_train.min(), dataset.x_train.max()) == (-1, 1)
    for part in PARTS:
        y = getattr(dataset, f"y_{part}")
        assert (y.bincount(minlength=dataset.info["n_classes"]) > 0).all()
    if dataset.info["matches_published"] and name == "mnist":
        assert dataset.info["sizes"] == {"train": 48000, "calibration": 12000, "test": 10000}
        assert torch.cat([dataset.y_train, dataset.y_calibration]).bincount().tolist() == [
            5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
        ]  # fmt: skip
