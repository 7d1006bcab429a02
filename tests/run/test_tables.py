"""Tables: held to data/columns.yaml, floats exact."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from refusal import refused
from stages import frame

from utils.run.layout import PRODUCER
from utils.run.tables import DTYPES, SCHEMAS, read_table, write_table


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "change",
    [("step", "steps"), ("0.1", "x"), ("3,x", "3.5,x"), ("0.1\n", "0.1,7\n"), (None, None)],
)
def test_a_table_edited_by_hand_is_one_sentence(change):
    write_table(Path("training.csv"), "training.csv", frame("training.csv"))
    text = Path("training.csv").read_text()
    Path("training.csv").write_text("" if change[0] is None else text.replace(*change))
    with pytest.raises(ValueError) as caught:
        read_table("training.csv")
    assert "\n" not in str(caught.value) and "training.csv" in str(caught.value)


def test_floats_of_a_table_are_exact():
    values = np.random.default_rng(0).standard_normal(2000) * 10.0 ** np.random.default_rng(
        1
    ).integers(-300, 300, 2000)
    table = pd.DataFrame(
        {"step": range(2000), "phase": "train", "objective": values, "gradient_norm": -values}
    )
    write_table(Path("training.csv"), "training.csv", table)
    assert np.array_equal(read_table("training.csv")["objective"], values)


def test_every_described_column_has_a_type_and_a_meaning():
    for file, schema in SCHEMAS.items():
        assert file in PRODUCER
        for column, (dtype, meaning) in schema.items():
            assert column.isidentifier() and dtype in DTYPES and meaning
            assert column not in (
                "device",
                "wall_time",
                "wall_time_s",
            )  # a table is the same bytes every time


@pytest.mark.parametrize("end", [-1, -2, -5])
def test_a_table_that_is_cut_off_is_one_sentence(tmp_path, end):
    path = tmp_path / "training.csv"
    row = {"step": [1], "phase": ["adam"], "gradient_norm": [0.25], "objective": [2.125]}
    write_table(path, path.name, pd.DataFrame(row))
    path.write_bytes(path.read_bytes()[:end])
    refused(lambda: read_table(path), "is cut off")
