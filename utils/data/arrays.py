"""Your own arrays: out of an .npz file, with every check that a split and a network need."""

from __future__ import annotations

import io

import numpy as np

KEYS = ("x_train", "y_train", "x_test", "y_test")


def checked_arrays(content: bytes, file: str) -> dict[str, np.ndarray]:
    """The arrays x_train, y_train and, where they are there, x_test, y_test.

    content  an .npz archive, as np.savez writes it
    file     its name, for messages

    Returns x (n, ...) float32, or uint8 where it was uint8, and y (n,) int64, by name.

    Raises ValueError where the archive is damaged or holds pickled objects; inputs are no numbers,
    not finite in float32 or of two shapes; labels are no integers from 0 on, one an example.

    >>> file = io.BytesIO()
    >>> np.savez(file, x_train=np.ones((6, 2)), y_train=np.arange(6) % 2)
    >>> checked_arrays(file.getvalue(), "mine.npz")["x_train"].dtype
    dtype('float32')
    """
    arrays = _unpacked(content, file)
    for key in ("x_train", "y_train"):
        if key not in arrays:
            raise ValueError(
                f"{file} has no array {key}: save x_train and y_train (and x_test, y_test) in it."
            )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{file} has only one of x_test and y_test: save both or neither.")
    for x_name, y_name in (("x_train", "y_train"), ("x_test", "y_test")):
        if x_name in arrays:
            arrays[x_name] = _inputs(arrays[x_name], f"{x_name} in {file}")
            arrays[y_name] = _labels(arrays[y_name], f"{y_name} in {file}")
            if len(arrays[x_name]) != len(arrays[y_name]):
                raise ValueError(
                    f"{x_name} in {file} has {len(arrays[x_name])} examples and {y_name} "
                    f"{len(arrays[y_name])} labels: give one label an example."
                )
    x = arrays["x_train"]
    x_test = arrays.get("x_test", x)
    if x_test.shape[1:] != x.shape[1:] or x_test.dtype != x.dtype:
        raise ValueError(
            f"x_test in {file} is {x_test.dtype} {x_test.shape[1:]} an example and x_train "
            f"{x.dtype} {x.shape[1:]}: give both the same type and shape."
        )
    return arrays


def _unpacked(content: bytes, file: str) -> dict[str, np.ndarray]:
    """The arrays under the four known names; nothing else in the archive is unpacked."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {key: archive[key] for key in KEYS if key in archive.files}
    except Exception as error:  # a damaged archive can fail anywhere in zip, zlib or a header
        pickled = "Object arrays" in str(error)
        damage = "holds pickled objects" if pickled else "is truncated or not an .npz archive"
        raise ValueError(
            f"{file} {damage}: write it again with np.savez(path, x_train=..., y_train=...) from "
            "number arrays."
        ) from None


def _inputs(x: np.ndarray, name: str) -> np.ndarray:
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{name} has dtype {x.dtype}: give floats, kept as they are, or uint8 with 0..255."
        )
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{name} has shape {x.shape}: give (n, ...) with at least one example and one feature."
        )
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name} has NaN or values beyond float32 in {(~finite).sum()} of {len(x)} examples: "
            "remove them."
        )
    return np.ascontiguousarray(x)


def _labels(y: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} has dtype {y.dtype}: give integer labels 0..K-1.")
    if y.ndim != 1:
        raise ValueError(f"{name} has shape {y.shape}: give one label an example, shape (n,).")
    if y.size and y.min() < 0:
        raise ValueError(f"{name} holds the negative label {y.min()}: number the labels 0..K-1.")
    return y.astype(np.int64)
