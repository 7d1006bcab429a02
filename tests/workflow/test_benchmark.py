"""The benchmark still runs: a tiny round of every task on one model, its tables, and what it
refuses."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest

from workflow.benchmark import __main__ as benchmark
from workflow.benchmark import settings
from workflow.benchmark.tables import merge, shown, table

PAGE = "# Title\n\n<!-- benchmark -->\n\nold\n\n<!-- /benchmark -->\n\nafter\n"


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_quick_run_measures_every_task_and_writes_both_tables(tmp_path):
    page, path = tmp_path / "README.md", tmp_path / "results" / "benchmark.csv"
    page.write_text(PAGE, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "workflow.benchmark",
        "--quick",
        "--models",
        "small-40-step",
        "--write",
    ]
    done = subprocess.run(
        [*command, "--csv", str(path), "--page", str(page)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(settings.ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr

    frame = pd.read_csv(path)
    assert list(frame.columns) == settings.COLUMNS
    assert list(frame["task"].unique()) == list(settings.TASKS)
    always = [
        "task",
        "model",
        "dtype",
        "method",
        "base",
        "unit",
        "parameters",
        "n",
        "chunk",
        "rounds",
        "ms_per_unit",
    ]
    assert frame[[*always, "device", "torch", "threads"]].notna().all(axis=None)
    assert (
        (frame["ms_per_unit"] > 0).all()
        and (frame["chunk"] <= frame["n"]).all()
        and (frame["threads"] == 1).all()
    )
    timed = frame[frame["task"] != "memory"]
    assert (timed["ratio_low"] <= timed["ratio"]).all() and (
        timed["ratio"] <= timed["ratio_high"]
    ).all()
    aimed = timed[timed["target"].notna()]
    assert ((aimed["ratio"] >= aimed["target"]) == (aimed["reached"] == "reached")).all()

    ours = frame[frame["method"].str.startswith("ours") & frame["task"].isin(["norms", "norm"])]
    assert (
        (ours["error_worst"] < 1e-3).all()
        and (ours["within_1e-3"] == 1).all()
        and (ours["not_converged"] == 0).all()
    )
    exact = frame[frame["task"] == "losses"]
    assert (exact["error_worst"] < 1e-6).all()
    assert (frame.loc[frame["task"] == "memory", "peak_mib"] > 50).all()

    text = page.read_text(encoding="utf-8")
    before, page_table, after = (
        text.split("<!-- benchmark -->")[0],
        text.split("<!--")[1],
        text.split("-->")[-1],
    )
    assert (before, after) == ("# Title\n\n", "\n\nafter\n") and "old" not in text
    lines = [line for line in page_table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + sum(map(shown, timed.to_dict("records"))) > 3 and {
        line.count(" | ") for line in lines
    } == {7}
    assert page_table.split("-->")[1].strip() in done.stdout


def test_a_later_run_replaces_its_own_rows_only(tmp_path):
    path = tmp_path / "benchmark.csv"
    row = dict.fromkeys(settings.COLUMNS, 1.0) | {"model": "medium", "method": "ours"}
    pd.DataFrame([row | {"task": task} for task in ("norms", "norm")]).to_csv(path, index=False)
    there = row | {"task": "norms", "device": 2.0}
    new = pd.DataFrame(
        [row | {"task": "norm", "n": 7.0}, row | {"task": "norms", "model": "small-trained"}, there]
    )
    merged = merge(new, path)
    assert list(zip(merged["task"], merged["model"], merged["device"], merged["n"])) == [
        ("norms", "small-trained", 1.0, 1.0),
        ("norms", "medium", 1.0, 1.0),
        ("norms", "medium", 2.0, 1.0),
        ("norm", "medium", 1.0, 7.0),
    ]


def test_each_device_has_a_table_of_its_own_and_the_cpu_comes_first():
    both = pd.read_csv(settings.CSV)
    gpu = both[both["task"] != "memory"].assign(
        device="A GPU", ms_per_unit=1.0, target=float("nan")
    )
    cpu, other = table(both[both["device"] == "cpu"]), table(gpu)
    assert table(pd.concat([gpu, both[both["device"] == "cpu"]])) == f"{cpu}\n\n{other}"
    assert "device cpu;" in cpu and "device A GPU;" in other and "Peak memory" not in other


def test_refusals_are_one_sentence(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("no markers", encoding="utf-8")
    assert "give 1 to 269." in refused(["--n", "270"], capsys)
    assert "leave --write out." in refused(["--quick", "--write"], capsys)
    with patch.object(benchmark.torch.cuda, "is_available", lambda: False):
        assert "--device is cuda and PyTorch sees no GPU here: give cpu." in refused(
            ["--device", "cuda"], capsys
        )
    assert "add the two lines." in refused(["--write", "--page", str(page)], capsys)
    assert Path(settings.CSV).parts[-2:] == ("benchmarks", "benchmark.csv")
