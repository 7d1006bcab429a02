"""The published files: what data/registry.json says of them, and what lies on a disk.

Checksums are of the uncompressed content, so that a copy which was packed anew is recognised.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = ROOT / "data" / "registry.json"


@dataclass(frozen=True)
class PublishedSet:
    """One data set of the registry.

    source        where it comes from, a phrase for readers
    licence       its licence, a phrase for readers
    class_names   name of every class, in the order of the labels
    files         name of each file -> {"bytes": length, "sha256": checksum}, both uncompressed
    mirrors       addresses that end in "/", in the order in which they are tried
    archive       name of the archive that holds the files; "" where each is downloaded by itself
    archive_hash  checksum of the archive as it is downloaded, "md5:..." or "sha256:..."; None where
                  the registry has none
    owner         checksum -> name of the file published with it, over all sets of the registry

    >>> published_set("mnist").licence
    'CC BY-SA 3.0'
    """

    source: str
    licence: str
    class_names: list[str]
    files: dict[str, dict]
    mirrors: list[str] = field(default_factory=list)
    archive: str = ""
    archive_hash: str | None = None
    owner: dict[str, str] = field(default_factory=dict)

    def is_published(self, content: bytes, file: str) -> bool:
        """Is `content`, as it lies on a disk, the published content of `file`?

        At most one byte more than the published length is unpacked, whatever a mirror sends.

        content  the bytes, compressed where the name of the file says so
        file     name of a file of this set

        >>> published_set("cifar100").is_published(b"", "cifar-100-binary/test.bin")
        False
        """
        expected = self.files[file]
        try:
            unpacked = uncompressed(content, file, limit=expected["bytes"] + 1)
        except ValueError:
            return False
        return sha256(unpacked) == expected["sha256"]


@dataclass
class PublishedFolder:
    """The files of one set in a folder, and what was found out about those that were read.

    path           the folder
    published      what the registry says of the set
    checksums      file -> sha256 of the file as it lies there, of every file read so far
    all_published  are all files read so far the published ones?

    >>> import sklearn
    >>> bundled = Path(sklearn.__file__).parent / "datasets" / "data"
    >>> folder = PublishedFolder(bundled, published_set("digits"))
    >>> content = folder.read("digits.csv.gz")
    >>> len(content), folder.about("digits")["matches_published"]
    (264712, True)
    """

    path: Path
    published: PublishedSet
    checksums: dict[str, str] = field(default_factory=dict)
    all_published: bool = True

    def has(self, file: str) -> bool:
        """Is there a file of this name, such as "mnist/train-labels-idx1-ubyte.gz"?"""
        return (self.path / file).is_file()

    def read(self, file: str) -> bytes:
        """The uncompressed content of `file`.

        A file may differ from the published one, a smaller selection for instance, but not be
        another published file, and not have the published length and another content.

        file  name of a file of the set

        Raises FileNotFoundError where there is no such file; ValueError where it is damaged or
        stands under the wrong name.
        """
        if not self.has(file):
            raise FileNotFoundError(
                f"There is no file {file} in {self.path}: put it there, or leave DATA_ROOT empty "
                "to download it."
            )
        stored = (self.path / file).read_bytes()
        content = uncompressed(stored, file)
        owner = self.published.owner.get(sha256(content))
        if owner not in (file, None):
            raise ValueError(
                f"{file} holds what is published as {owner}: put every file under its own name."
            )
        if owner is None and len(content) == self.published.files[file]["bytes"]:
            raise ValueError(
                f"{file} has the published length and another content: delete it and fetch it "
                "again."
            )
        self.checksums[file] = sha256(stored)
        self.all_published &= owner == file
        return content

    def about(self, name: str) -> dict:
        """The part of a data set's `info` that says where it comes from.

        name  of the data set
        """
        return {
            "name": name,
            "source": self.published.source,
            "licence": self.published.licence,
            "sha256": self.checksums,
            "matches_published": self.all_published,
            "class_names": self.published.class_names,
        }


def published_set(name: str) -> PublishedSet:
    """What the registry says of one data set.

    name  a name that stands in data/registry.json

    >>> published_set("cifar10").archive
    'cifar-10-binary.tar.gz'
    """
    registry = json.loads(REGISTRY.read_text(encoding="utf-8"))
    owner = {
        expected["sha256"]: file
        for entry in registry.values()
        for file, expected in entry["files"].items()
    }
    return PublishedSet(**registry[name], owner=owner)


def sha256(content: bytes) -> str:
    """The SHA-256 of some bytes of content, in hexadecimal digits.

    >>> sha256(b"abc")[:8]
    'ba7816bf'
    """
    return hashlib.sha256(content).hexdigest()


def uncompressed(content: bytes, file: str, limit: int = -1) -> bytes:
    """The content of a file without its compression.

    content  the bytes of the file as it lies on a disk
    file     its name; the ending .gz says that it is compressed
    limit    stop after that many bytes; -1 for all

    Raises ValueError where it should be compressed and is truncated or something else.

    >>> uncompressed(gzip.compress(b"abc"), "letters.gz")
    b'abc'
    """
    if not file.endswith(".gz"):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            return stream.read(limit)
    except (EOFError, OSError, zlib.error):
        raise ValueError(
            f"{file} is truncated or not a gzip file: delete it and fetch it again."
        ) from None
