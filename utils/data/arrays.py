"""Your own arrays: out of an .npz file, with every check that a split and a network need."""

from __future__ import annotations

import io

import numpy as np

KEYS = ("x_train", "y_train", "x_test", "y_test")


def checked_arrays(content: bytes, file: str) -> dict[str, np.ndarray]:
    """The arrays x_train, y_train and, where they are there, x_test, y_test.

    Args:
        content: an .npz archive, as np.savez writes it.
        file: its name, for messages.

    Returns:
        x (n, ...) float32, or uint8 where it was uint8, and y (n,) int64, by name.

    Raises:
        ValueError: the archive is damaged or holds pickled objects; inputs are no numbers, not
            finite in float32 or of two shapes; labels are no integers from 0, one an example.

    Example:
        >>> file = io.BytesIO()
        >>> np.savez(file, x_train=np.ones((6, 2)), y_train=np.arange(6) % 2)
        >>> checked_arrays(file.getvalue(), "mine.npz")["x_train"].dtype
        dtype('float32')
    """
    given = _unpacked(content, file)
    _check_names(given, file)
    checked = _checked_pair(given, "train", file)
    if "x_test" not in given:
        return checked
    checked |= _checked_pair(given, "test", file)
    x = checked["x_train"]
    x_test = checked["x_test"]
    if x_test.shape[1:] != x.shape[1:] or x_test.dtype != x.dtype:
        raise ValueError(
            f"x_test in {file} is {x_test.dtype} {x_test.shape[1:]} an example and x_train "
            f"{x.dtype} {x.shape[1:]}: give both the same type and shape."
        )
    return checked


def _unpacked(content: bytes, file: str) -> dict[str, np.ndarray]:
    """The arrays under the four known names; nothing else in the archive is unpacked."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {key: archive[key] for key in KEYS if key in archive.files}
    except Exception as error:  # a damaged archive can fail anywhere in zip, zlib or a header
        damage = "is truncated or not an .npz archive"
        if "Object arrays" in str(error):
            damage = "holds pickled objects"
        raise ValueError(
            f"{file} {damage}: write it again with np.savez(path, x_train=..., y_train=...) from "
            "number arrays."
        ) from None


def _check_names(arrays: dict[str, np.ndarray], file: str) -> None:
    for key in ("x_train", "y_train"):
        if key not in arrays:
            raise ValueError(
                f"{file} has no array {key}: save x_train and y_train (and x_test, y_test) in it."
            )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{file} has only one of x_test and y_test: save both or neither.")


def _checked_pair(arrays: dict[str, np.ndarray], part: str, file: str) -> dict[str, np.ndarray]:
    """x (n, ...) float32 or uint8 and y (n,) int64, or a ValueError that names what is wrong."""
    x = arrays[f"x_{part}"]
    y = arrays[f"y_{part}"]
    x_name = f"x_{part} in {file}"
    _check_shape_of_inputs(x, x_name)
    _check_labels(y, f"y_{part} in {file}")
    if len(x) != len(y):
        raise ValueError(
            f"{x_name} has {len(x)} examples and y_{part} {len(y)} labels: give one label an "
            "example."
        )
    _check_numbering(y, f"y_{part} in {file}", dense=part == "train")
    if x.dtype != np.uint8:
        x = _finite_float32(x, x_name)
    return {f"x_{part}": np.ascontiguousarray(x), f"y_{part}": y.astype(np.int64)}


def _check_shape_of_inputs(x: np.ndarray, name: str) -> None:
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{name} has dtype {x.dtype}: give floats, kept as they are, or uint8 with 0..255."
        )
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{name} has shape {x.shape}: give (n, ...) with at least one example and one feature."
        )


def _check_labels(y: np.ndarray, name: str) -> None:
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} has dtype {y.dtype}: give integer labels 0..K-1.")
    if y.ndim != 1:
        raise ValueError(f"{name} has shape {y.shape}: give one label an example, shape (n,).")


def _check_numbering(y: np.ndarray, name: str, dense: bool) -> None:
    """Labels from 0; where they have to be `dense`, none beyond the number of examples."""
    if y.min() < 0:
        raise ValueError(f"{name} holds the negative label {y.min()}: number the labels 0..K-1.")
    if dense and y.max() >= len(y):
        raise ValueError(
            f"{name} holds the label {y.max()} in {len(y)} examples: number the labels 0..K-1."
        )


def _finite_float32(x: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    features = tuple(range(1, x.ndim))
    bad = (~np.isfinite(x)).any(axis=features).sum()
    if bad:
        raise ValueError(
            f"{name} has NaN or values beyond float32 in {bad} of {len(x)} examples: remove them."
        )
    return x
