"""Every set comes out in one form: round trips on tiny files, subsets, orders, bad arguments."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tiny_files import (
    MNIST,
    PARTS,
    check_form,
    cifar_records,
    equal,
    images,
    pool_rows,
    refused,
    rows,
    write_cifar10,
    write_mnist,
    write_npz,
)

from utils.data import load_dataset


def test_digits_are_scikit_learns_to_the_last_grey_level():
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
    assert (
        dataset.info["split"].startswith("The pool")
        and "official test set (20 samples)" in dataset.info["split"]
    )


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
    """The same examples train and calibrate with or without a test set; the next are held out."""
    x, y = images(60, (1, 4, 4), 3)
    extra = (
        dict(zip(("x_test", "y_test"), images(9, (1, 4, 4), 3, seed=1), strict=True))
        if official
        else {}
    )
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, **extra)
    options = {
        "order": "published",
        "n_samples": 50,
        "calibration_fraction": 0.2,
        "test_fraction": 0.1,
    }
    dataset = load_dataset(f"npz:{tmp_path / 'mine.npz'}", **options)
    ends = [0, 40, 50] if official else [0, 40, 50, 55]
    scaled = [
        tuple(v.reshape(-1).astype(np.float32) / np.float32(127.5) - np.float32(1)) for v in x
    ]
    for part, (a, b) in zip(PARTS, itertools.pairwise(ends), strict=False):
        found = [tuple(v.numpy().reshape(-1)) for v in getattr(dataset, f"x_{part}")]
        assert sorted(found) == sorted(scaled[a:b]) and found != scaled[a:b]
    kept = f"the first {ends[-1]} samples split in the published order"
    assert kept in dataset.info["split"].lower() and dataset.info["sizes"]["test"] == (
        9 if official else 5
    )
    assert not torch.equal(
        dataset.y_train, load_dataset(f"npz:{tmp_path / 'mine.npz'}", seed=1, **options).y_train
    )


def test_too_many_samples_in_the_published_order(tmp_path):
    x, y = images(60, (1, 4, 4), 3)
    name = write_npz(tmp_path / "d.npz", x_train=x, y_train=y)
    options = {"order": "published", "test_fraction": 0.1}
    assert load_dataset(name, n_samples=54, **options).info["sizes"]["test"] == 5
    with pytest.raises(
        ValueError,
        match=r"n_samples is 56 with 6 held out after them: choose at most 60 together\.$",
    ):
        load_dataset(name, n_samples=56, **options)


def test_duplicates_across_parts_are_counted(tmp_path):
    x, y = images(60, (1, 4, 4), 3)
    x_test, y_test = images(10, (1, 4, 4), 3, seed=1)
    x_test[:4] = x[:4]
    name = write_npz(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    assert load_dataset(name).info["duplicates_across_parts"] == 4
    constant = np.zeros((20, 3))
    name = write_npz(tmp_path / "c.npz", x_train=constant, y_train=np.arange(20) % 2)
    assert (
        load_dataset(name).info["duplicates_across_parts"] == 8
    )  # every calibration and held-out sample
    assert load_dataset("digits").info["duplicates_across_parts"] == 0


def test_unknown_name_lists_the_known():
    for name in ("mnsit", "", None, 3, "../x"):
        refused(
            "choose digits, mnist, fashion_mnist, cifar10, cifar100, synthetic, or npz:PATH", name
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": True}, "seed is True"),
        ({"n_samples": -3}, "n_samples is -3"),
        ({"n_samples": 1800}, "n_samples is 1800: choose 10 to 1787, or 0 for all 1797 examples"),
        ({"n_samples": 1790}, "choose 10 to 1787"),
        ({"n_samples": 12}, "raise n_samples"),
        ({"calibration_fraction": 0}, "calibration_fraction is 0"),
        ({"calibration_fraction": 1.0}, "calibration_fraction is 1.0"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
        ({"test_fraction": "0.2"}, "test_fraction is '0.2'"),
        ({"calibration_fraction": 0.6, "test_fraction": 0.4}, "sum below 1"),
        ({"calibration_fraction": 0.001}, "calibration part would have 2 of 1797 examples"),
        ({"test_fraction": 0.0001}, "test part would have 0 of 1797 examples"),
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


def files_on_this_machine():
    root = Path(os.environ.get("DATA_ROOT") or "/nonexistent")
    folders = {
        "mnist": "mnist",
        "fashion_mnist": "fashion_mnist",
        "cifar10": "cifar-10-batches-bin",
    }
    return root, [
        name
        for name, folder in (folders | {"cifar100": "cifar-100-binary"}).items()
        if (root / folder).is_dir()
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
