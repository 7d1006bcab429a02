"""Published files: none stands in for another, and what is committed about them is complete."""

import gzip
import json
import re
import shutil

import pytest
from tiny_files import (
    CIFAR10,
    MNIST,
    SWAPS,
    publish,
    refused,
    write_all,
    write_mnist,
)

from utils.data import NAMES, load_dataset, published


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
    content = bytearray(published.uncompressed(path.read_bytes(), file))
    content[-1] = (content[-1] + 1) % 2  # a label or a pixel that the format allows
    path.write_bytes(gzip.compress(bytes(content)) if file.endswith(".gz") else bytes(content))
    refused(
        f"{file} has the published length and another content: delete it and fetch it again",
        name,
        path.parents[1],
    )


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path, monkeypatch):
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist")
    (tmp_path / "disk" / "mnist").rename(tmp_path / "disk" / "fashion_mnist")
    refused(
        "fashion_mnist/train-images.* published as mnist/train-images",
        "fashion_mnist",
        tmp_path / "disk",
    )


@pytest.mark.parametrize("name, other", [("cifar10", "cifar100"), ("cifar100", "cifar10")])
def test_selections_of_one_cifar_are_no_file_of_the_other(tmp_path, name, other):
    write_all(tmp_path)
    files = {"cifar10": CIFAR10[0], "cifar100": "cifar-100-binary/train.bin"}
    shutil.copy(tmp_path / files[other], tmp_path / files[name])
    refused("not a multiple of", name, tmp_path)


def test_registry_is_complete():
    registry = json.loads(published.REGISTRY.read_text())
    assert set(registry) == set(NAMES) - {"synthetic"}
    for entry in registry.values():
        assert entry["source"] and entry["licence"] and entry["class_names"]
        assert all(
            re.fullmatch("[0-9a-f]{64}", p["sha256"]) and p["bytes"] > 0
            for p in entry["files"].values()
        )
    for name in set(registry) - {"digits"}:
        assert len(registry[name]["mirrors"]) >= 2 and all(
            mirror.endswith("/") for mirror in registry[name]["mirrors"]
        )


def test_readme_of_the_data_agrees_with_the_registry():
    readme = (published.ROOT / "data" / "README.md").read_text()
    for entry in json.loads(published.REGISTRY.read_text()).values():
        for file, expected in entry["files"].items():
            assert f"| `{file}` | {expected['bytes']:,} | `{expected['sha256']}` |" in readme
        if "archive" in entry:
            archive_hash = entry["archive_hash"].removeprefix("md5:")
            assert f"| `{entry['archive']}` | `{archive_hash}` |" in readme
        for mirror in entry.get("mirrors", ()):
            assert mirror in readme
