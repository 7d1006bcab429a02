"""Files that are there whole or not at all, and what identifies their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds, removed if it fails.

    path  the file to write; its folder is made where it is missing

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> page = Path(folder.name, "new", "page.txt")
    >>> with atomic(page) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> page.read_text(), [p.name for p in page.parent.iterdir()]
    ('whole', ['page.txt'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writable(what: str) -> Iterator[None]:
    """Turn any OSError of the block into one sentence: a full disk, a folder without permission.

    what  words for the thing that is written, the subject of the sentence

    Raises OSError where the block does.

    >>> with writable("the table"):
    ...     open("/nowhere/table.csv", "w")
    Traceback (most recent call last):
    OSError: the table cannot be written (no such file or directory): make room, or the folder \
writable; what was there is kept.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise OSError(
            f"{what} cannot be written ({reason}): make room, or the folder writable; "
            "what was there is kept."
        ) from None


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of the bytes of the file at `path`.

    >>> sha256("/dev/null")[:16]
    'e3b0c44298fc1c14'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(value: Any) -> str:
    """The text of a JSON file: numpy scalars, arrays and tensors become numbers and lists.

    value  numbers, text, None, lists, tuples, sets, paths, mappings, arrays, nested as one likes

    Raises TypeError for anything else.

    >>> print(as_json({"sizes": (1, 2), "file": Path("a.csv")}), end="")
    {
     "sizes": [
      1,
      2
     ],
     "file": "a.csv"
    }
    """
    return json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"{type(value).__name__} does not go into a JSON file: "
        "convert it to numbers, text or lists."
    )
