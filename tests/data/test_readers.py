"""Every damaged file is refused with one sentence that says what to do."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_files import MNIST, idx, refused, write_cifar10, write_mnist, write_npz, zipped


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
        (
            0,
            zipped(bytes([0, 0, 8, 3]) + b"\xff" * 12),
            "holds 16 bytes where its header announces",
        ),
        (0, zipped(good_idx((59, 5, 5))), "has 59 images and .* 60 labels"),
        (0, zipped(good_idx((60, 5, 6))), "differ in size"),
        (1, zipped(good_idx()), "train-labels.* is not an idx file of labels"),
        (1, zipped(idx(np.full(60, 10, np.uint8))), "train-labels.* holds the label 10, beyond 9"),
        (1, zipped(idx(np.arange(60, dtype=np.uint8) % 9)), "Class 9 of 0 to 9 has 0 examples"),
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
        (
            {"x_train": spoiled(np.nan), "y_train": Y},
            "x_train in bad.npz has NaN .* in 1 of 30 examples",
        ),
        ({"x_train": spoiled(-np.inf), "y_train": Y}, "NaN or values beyond float32 in 1 of 30"),
        ({"x_train": spoiled(1e300), "y_train": Y}, "NaN or values beyond float32 in 1 of 30"),
        (
            {"x_train": X, "y_train": Y, "x_test": spoiled(np.nan), "y_test": Y},
            "x_test in bad.npz has NaN",
        ),
        (
            {"x_train": X, "y_train": Y.astype(float)},
            "y_train in bad.npz has dtype float64: give integer labels",
        ),
        ({"x_train": X, "y_train": Y > 0}, "y_train in bad.npz has dtype bool"),
        ({"x_train": X, "y_train": Y.astype(str)}, "y_train in bad.npz has dtype <U"),
        ({"x_train": X, "y_train": Y[:, None]}, r"y_train in bad.npz has shape \(30, 1\)"),
        ({"x_train": X, "y_train": Y - 1}, "negative label -1"),
        ({"x_train": X, "y_train": Y * 2}, "Class 1 of 0 to 4 has 0 examples.*without gaps"),
        ({"x_train": X, "y_train": Y + 1}, "Class 0 of 0 to 3 has 0 examples.*without gaps"),
        ({"x_train": X, "y_train": Y + 10**12}, "holds the label 10000000000"),
        ({"x_train": X, "y_train": Y * 0}, "single class"),
        (
            {"x_train": X, "y_train": np.r_[Y[:28] % 2, 2, 2]},
            "Class 2 of 0 to 2 has 2 examples, fewer than the 3",
        ),
        (
            {"x_train": X[:29], "y_train": Y},
            "x_train in bad.npz has 29 examples and y_train 30 labels",
        ),
        ({"x_train": X[:, 0], "y_train": Y}, r"x_train in bad.npz has shape \(30,\)"),
        ({"x_train": X[:0], "y_train": Y[:0]}, r"x_train in bad.npz has shape \(0, 4\)"),
        (
            {"x_train": X.astype(int), "y_train": Y},
            "x_train in bad.npz has dtype int64: give floats",
        ),
        ({"x_train": X + 1j, "y_train": Y}, "x_train in bad.npz has dtype complex128"),
        (
            {"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y},
            "give both the same type and shape",
        ),
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
    for content in (
        whole[:-30],
        whole[:60],
        b"",
        b"hello",
        pickled,
        single.getvalue(),
        bytes(flipped),
    ):
        (tmp_path / "no.npz").write_bytes(content)
        refused("no.npz is truncated or not an .npz archive", f"npz:{tmp_path}/no.npz")


def test_a_pickle_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    name = write_npz(tmp_path / "bad.npz", x_train=np.array([Trap()], dtype=object), y_train=Y)
    refused("holds pickled objects", name)
    assert not (tmp_path / "executed").exists()
