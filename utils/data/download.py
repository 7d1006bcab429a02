"""Downloads: each missing file of a set from the first mirror with its published content.

A download is checked in a folder beside the target and renamed into it, so that the target never
holds anything else, not even after a kill.
"""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path

import pooch
from filelock import FileLock

from utils.data.published import ROOT, PublishedSet

DOWNLOADS = ROOT / "data" / "downloads"
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # another mirror would not help


def download(published: PublishedSet, folder: Path) -> None:
    """Fetch what is missing or altered in a folder; what has its published content is kept.

    One process downloads while others wait for it.

    published  the set, with its mirrors and checksums
    folder     where its files belong; `folder`.tmp beside it is used meanwhile and removed

    Raises FileNotFoundError where no mirror has a file; OSError where the folder cannot be written.

    >>> import tempfile
    >>> nothing = PublishedSet("nowhere", "none", class_names=[], files={})
    >>> download(nothing, Path(tempfile.gettempdir()))  # nothing is missing: nothing is fetched
    """
    if not missing_files(published, folder):
        return
    with _lock(folder):
        downloads: dict[str, list[str]] = {}
        # asked again: the process that held the lock may have fetched them
        for file in missing_files(published, folder):
            name = published.archive or Path(file).name
            downloads.setdefault(name, []).append(file)
        for name, files in downloads.items():
            _from_any_mirror(name, files, published, folder)


def missing_files(published: PublishedSet, folder: Path) -> list[str]:
    """The files of a set that a folder lacks or holds with another content.

    published  the set
    folder     where they should be

    >>> nothing = PublishedSet("nowhere", "none", class_names=[], files={})
    >>> missing_files(nothing, Path("."))
    []
    """
    missing = []
    for file in published.files:
        path = folder / file
        if not path.is_file() or not published.is_published(path.read_bytes(), file):
            missing.append(file)
    return missing


def _lock(folder: Path) -> AbstractContextManager:
    """The lock on the folder, taken; it is released at the end of a `with`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): make it writable, or set DATA_ROOT to "
            "a folder that holds the files."
        ) from None


def _from_any_mirror(name: str, files: list[str], published: PublishedSet, folder: Path) -> None:
    """`files` into `folder` out of the download `name`, an archive or a file."""
    scratch = folder.with_suffix(".tmp")
    failures = []
    for mirror in published.mirrors:
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
        remote = pooch.create(scratch, mirror, registry={name: published.archive_hash})
        try:
            stored = remote.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True))
            for file in files:
                _take(file, Path(stored), published, folder)
            return
        except Exception as error:  # the network, the disk, or damage anywhere in gzip, zlib or tar
            if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
                raise OSError(
                    f"{folder} cannot hold {name} ({error.strerror}): make room in it."
                ) from None
            failures.append(f"{mirror}{name} ({_reason(error)})")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise FileNotFoundError(
        f"{name} could not be downloaded from {' or '.join(failures)}: check the network, or put "
        f"{', '.join(missing_files(published, folder))} into {folder}, or set DATA_ROOT to a "
        "folder that holds the set."
    )


def _take(file: str, stored: Path, published: PublishedSet, folder: Path) -> None:
    """Check one file of a download, then rename it into the folder."""
    if published.archive:
        length = published.files[file]["bytes"]
        with tarfile.open(stored) as archive:
            member = archive.extractfile(file)
            content = member.read(length + 1) if member else b""
    else:
        content = stored.read_bytes()
    if not published.is_published(content, file):
        raise ValueError(f"its {file} has not the published checksum")
    checked = stored.with_name("checked")
    checked.write_bytes(content)
    (folder / file).parent.mkdir(exist_ok=True)
    os.replace(checked, folder / file)


def _reason(error: Exception) -> str:
    if type(error) is ValueError:
        return str(error).split(". ")[0]  # pooch's words for a wrong checksum are three sentences
    return getattr(error, "strerror", None) or type(error).__name__
