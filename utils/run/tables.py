"""Result tables as CSV, held to the data dictionary `data/columns.yaml` on writing and reading."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

Schema = dict[str, list[str]]  # column -> [dtype, meaning with its unit]
DICTIONARY = Path(__file__).resolve().parents[2] / "data" / "columns.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# file -> column -> [dtype, meaning with its unit]. No device and no wall time: a table is the same
# bytes when it is made again; run.json has them.
SCHEMAS: dict[str, Schema] = yaml.load(DICTIONARY.read_text(), Loader=LOADER)
RUN_COLUMN = {"run": ["str", "name of the run"]}  # comes first where runs are pooled
DTYPES = {"int": "int64", "float": "float64", "str": "str", "bool": "bool"}


def _schema(file: str, pooled: bool) -> Schema:
    return (RUN_COLUMN if pooled else {}) | SCHEMAS.get(file, {})


def _dtypes(schema: Schema) -> dict[str, str]:
    return {column: DTYPES[dtype] for column, (dtype, _) in schema.items()}


def _fits(column: pd.Series, dtype: str) -> bool:
    if dtype == "str":
        return all(isinstance(value, str) for value in column)
    if pd.api.types.is_bool_dtype(column):
        return dtype == "bool"
    if pd.api.types.is_integer_dtype(column):
        return dtype in ("int", "float")
    return dtype == "float" and pd.api.types.is_float_dtype(column)


def check_schema(file: str, frame: pd.DataFrame, pooled: bool = False) -> pd.DataFrame:
    """`frame` with the columns, order and dtypes that data/columns.yaml gives.

    file    name of the table
    pooled  whether a column `run` comes first

    Raises ValueError with one sentence where a column is missing, unknown or of another dtype.

    >>> row = {"step": [1], "phase": ["adam"], "gradient_norm": [0.5], "objective": [2]}
    >>> list(check_schema("training.csv", pd.DataFrame(row)))
    ['step', 'phase', 'objective', 'gradient_norm']
    """
    if file not in SCHEMAS:
        raise ValueError(f"{file} has no schema: describe its columns in data/columns.yaml.")
    schema = _schema(file, pooled)
    missing = [column for column in schema if column not in frame]
    extra = [column for column in frame if column not in schema]
    wrong = [f"lacks the column {column}" for column in missing[:1]]
    wrong += [f"has the unknown column {column}" for column in extra[:1]]
    if wrong:
        raise ValueError(f"{file} {' and '.join(wrong)}: make it agree with data/columns.yaml.")
    for column, (dtype, _) in schema.items():
        if not _fits(frame[column], dtype):
            raise ValueError(
                f"{file} has values in column {column} that are not {dtype}: convert them."
            )
    return frame[list(schema)].astype(_dtypes(schema))


def write_table(path: Path, file: str, frame: pd.DataFrame) -> None:
    """Write CSV with shortest floats that read back exactly, "nan" for a float that is not there.

    path   where to
    file   name of the table in data/columns.yaml
    frame  its rows

    Raises ValueError as `check_schema` does.
    """
    check_schema(file, frame).to_csv(path, index=False, na_rep="nan", lineterminator="\n")


def read_table(path: Path | str, file: str | None = None, pooled: bool = False) -> pd.DataFrame:
    """Read what `write_table` wrote, bit for bit.

    path    where from
    file    name of the table in data/columns.yaml (default: the path's own)
    pooled  whether a column `run` comes first

    Raises ValueError with one sentence where the file is no such table.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name, "training.csv")
    >>> row = {"step": [1], "phase": ["adam"], "gradient_norm": [0.1 + 0.2], "objective": [2]}
    >>> write_table(path, path.name, pd.DataFrame(row))
    >>> float(read_table(path)["gradient_norm"][0])
    0.30000000000000004
    """
    file = file or Path(path).name
    schema = _schema(file, pooled)
    numbers = {column: ["nan"] for column, (dtype, _) in schema.items() if dtype == "float"}
    with open(path, "rb") as stream:
        if not stream.read().endswith(b"\n"):
            raise ValueError(f"{path} is cut off in its last line: write it anew.")
    try:
        frame = pd.read_csv(path, dtype=_dtypes(schema), keep_default_na=False, na_values=numbers)
    except ValueError as error:  # pandas' ParserError is one too
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path} is not the table that data/columns.yaml describes ({reason}): write it anew."
        ) from None
    return check_schema(file, frame, pooled)
