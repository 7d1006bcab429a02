"""Downloads, from a server on this machine: bad mirrors, kills, a full disk, several at once."""

import errno
import gzip
import hashlib
import http.server
import multiprocessing
import os
import shutil
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pooch
import pytest
from tiny_files import (
    CIFAR10,
    MNIST,
    SWAPS,
    equal,
    publish,
    refused,
    write_all,
    write_cifar100,
    write_mnist,
    zipped,
)

from utils.data import download, load_dataset


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
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "*")
        yield folders, [f"http://127.0.0.1:{httpd.server_address[1]}/{m}/" for m in "ab"], asked
        httpd.shutdown()


def cached():
    """The files in the cache; the folder in which downloads are checked has to be gone."""
    assert not download.DOWNLOADS.with_suffix(".tmp").exists()
    found = sorted(
        str(p.relative_to(download.DOWNLOADS)) for p in download.DOWNLOADS.rglob("*") if p.is_file()
    )
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
def test_a_bad_mirror_is_passed_over_and_nothing_of_it_is_cached(
    server, tmp_path, monkeypatch, capsys, caplog, bad
):
    (first, second), urls, asked = server
    write_mnist(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", mirrors=urls)
    for file in MNIST:
        good = (tmp_path / "disk/mnist" / file).read_bytes()
        (first / file).write_bytes(good)
        packed_anew = gzip.compress(gzip.decompress(good), 1)  # the content counts
        (second / file).write_bytes(packed_anew)
    spoiled = BAD_FILES[bad]((first / MNIST[1]).read_bytes())
    (first / MNIST[1]).unlink()
    if spoiled is not None:
        (first / MNIST[1]).write_bytes(spoiled)
    (second / MNIST[1]).rename(tmp_path / "kept")
    from_where = f"{urls[0]}{MNIST[1]} .* or {urls[1]}{MNIST[1]} .HTTPError."
    missing = f"mnist/{MNIST[1]}, mnist/{MNIST[2]}, mnist/{MNIST[3]}"
    refused(
        f"{MNIST[1]} could not be downloaded from {from_where}: check the network, or put "
        f"{missing} into {download.DOWNLOADS}, or set DATA_ROOT",
        "mnist",
        error=FileNotFoundError,
    )
    assert cached() == [f"mnist/{MNIST[0]}"]

    (tmp_path / "kept").rename(second / MNIST[1])
    asked.clear()
    monkeypatch.setattr(pooch.get_logger(), "handlers", [caplog.handler])
    capsys.readouterr()
    dataset = load_dataset("mnist")
    tried = ["a/" + MNIST[1], "b/" + MNIST[1], "a/" + MNIST[2], "a/" + MNIST[3]]
    assert asked == [f"/{file}" for file in tried]  # the first file was kept
    assert equal(dataset, load_dataset("mnist", tmp_path / "disk"))
    assert dataset.info["matches_published"]
    assert cached() == sorted(f"mnist/{file}" for file in MNIST)
    announced = caplog.messages[1]
    assert announced.startswith(f"Downloading file '{MNIST[1]}' from '{urls[1]}{MNIST[1]}'")
    assert "100%" in capsys.readouterr().err  # the progress bar

    asked.clear()
    assert equal(dataset, load_dataset("mnist")) and not asked
    (download.DOWNLOADS / "mnist" / MNIST[3]).write_bytes(b"altered")
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

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        OSError, match=r"cannot hold train-images.* \(No space left on device\): make room in it\.$"
    ):
        load_dataset("mnist")
    assert len(asked) == 1 and not cached()  # the second mirror would not help


BAD_ARCHIVES = {
    "truncated": lambda path, root: path.write_bytes(path.read_bytes()[:-5000]),
    "a page": lambda path, root: path.write_bytes(b"<html>Please log in</html>"),
    "lacks a file": lambda path, root: archive(path, root, {f: f for f in CIFAR10[:-1]}),
    "holds the other set": lambda path, root: archive(
        path, root, {"cifar-100-binary": "cifar-100-binary"}
    ),
    "swapped": lambda path, root: archive(
        path, root, {f: CIFAR10[i - 1] for i, f in enumerate(CIFAR10)}
    ),
    "a folder for a file": lambda path, root: archive(
        path, root, {f: "cifar-10-batches-bin" for f in CIFAR10}
    ),
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
    refused(
        "cifar-10-binary.tar.gz could not .* put .*test_batch.bin into",
        "cifar10",
        error=FileNotFoundError,
    )
    for file in cached():
        assert (download.DOWNLOADS / file).read_bytes() == (tmp_path / "disk" / file).read_bytes()

    (tmp_path / "kept").rename(folders[1] / "cifar-10-binary.tar.gz")
    dataset = load_dataset("cifar10")
    assert (
        equal(dataset, load_dataset("cifar10", tmp_path / "disk"))
        and dataset.info["matches_published"]
    )
    assert cached() == CIFAR10
    asked.clear()
    assert equal(dataset, load_dataset("cifar10")) and not asked


def test_an_archive_is_not_unpacked_before_its_checksum(server, tmp_path, monkeypatch):
    folders, urls, _ = server
    write_all(tmp_path / "disk")
    for folder, level in zip(folders, (1, 9)):  # the first is the same set packed in another way
        archive(
            folder / "cifar-10-binary.tar.gz", tmp_path / "disk", {f: f for f in CIFAR10}, level
        )
    good = (folders[1] / "cifar-10-binary.tar.gz").read_bytes()
    known = f"md5:{hashlib.md5(good).hexdigest()}"
    publish(monkeypatch, tmp_path, tmp_path / "disk", "cifar10", mirrors=urls, archive_hash=known)
    opened = []
    unpack = tarfile.open

    def recorded(path):
        opened.append(Path(path).read_bytes() == good)
        return unpack(path)

    monkeypatch.setattr(tarfile, "open", recorded)
    dataset = load_dataset("cifar10")
    assert opened and all(opened)
    assert dataset.info["matches_published"]
    shutil.rmtree(download.DOWNLOADS)
    shutil.copy(folders[0] / "cifar-10-binary.tar.gz", folders[1])
    refused("does not match the known hash", "cifar10", error=FileNotFoundError)
    assert cached() == []


def test_what_unpacks_to_far_more_than_published_takes_no_memory(server, tmp_path, monkeypatch):
    (first, _), urls, _ = server
    write_all(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "mnist", "cifar10", mirrors=urls[:1])
    length = 64 * 2**20
    (tmp_path / "large").write_bytes(bytes(length))
    (first / MNIST[0]).write_bytes(gzip.compress(bytes(length)))
    archive(first / "cifar-10-binary.tar.gz", tmp_path, {f: "large" for f in CIFAR10[:1]}, level=1)
    tracemalloc.start()
    for name in ("mnist", "cifar10"):
        refused("has not the published checksum", name, error=FileNotFoundError)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < length / 8


def test_cifar100_out_of_an_archive_packed_anew(server, tmp_path, monkeypatch):
    (first, _), urls, _ = server
    write_cifar100(tmp_path / "disk")
    publish(monkeypatch, tmp_path, tmp_path / "disk", "cifar100", mirrors=urls)
    archive(
        first / "cifar-100-binary.tar.gz",
        tmp_path / "disk",
        {"cifar-100-binary": "cifar-100-binary"},
        level=1,
    )
    dataset = load_dataset("cifar100")
    assert (
        equal(dataset, load_dataset("cifar100", tmp_path / "disk"))
        and dataset.info["matches_published"]
    )


def test_without_a_network_one_sentence_says_what_to_put_where(tmp_path, monkeypatch):
    write_all(tmp_path / "disk")
    monkeypatch.setenv("NO_PROXY", "*")
    publish(
        monkeypatch,
        tmp_path,
        tmp_path / "disk",
        "mnist",
        "cifar10",
        mirrors=["http://127.0.0.1:9/a/"],
    )
    missing = ", ".join(f"mnist/{file}" for file in MNIST)
    refused(
        f"train-images.* .ConnectionError.: .*put {missing} into {download.DOWNLOADS}",
        "mnist",
        "",
        FileNotFoundError,
    )
    refused(f"ConnectionError.: .*put {', '.join(CIFAR10)} into", "cifar10", "", FileNotFoundError)
    assert cached() == []
    shutil.copytree(tmp_path / "disk" / "mnist", download.DOWNLOADS / "mnist")
    assert equal(load_dataset("mnist"), load_dataset("mnist", tmp_path / "disk"))
    (tmp_path / "a file").touch()
    monkeypatch.setattr(download, "DOWNLOADS", tmp_path / "a file" / "downloads")
    refused(
        "downloads cannot be written .Not a directory.: make it writable", "mnist", error=OSError
    )


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
    scratch = download.DOWNLOADS.with_suffix(".tmp")
    assert any(scratch.iterdir())
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
