"""A run's folder: published at once or not at all, stale inputs refused, one writer at a time."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stages import frame, in_another_process, make, p

from utils.run import locks
from utils.run.files import atomic, sha256
from utils.run.layout import PRODUCER
from utils.run.parameters import StudyReport
from utils.run.record import made_by, record_of
from utils.run.report_stage import ReportStage
from utils.run.start import begin
from utils.run.tables import SCHEMAS, read_table


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    for folder in list(locks.held):
        locks.release(folder)


@pytest.fixture
def every_schema(monkeypatch):
    """Tables of notebooks whose columns do not matter here."""
    for file in PRODUCER:
        if file.endswith(".csv"):
            monkeypatch.setitem(SCHEMAS, file, {"k": ("int", "k"), "value": ("float", "v")})


def snapshot() -> dict:
    return {path: path.read_bytes() for path in sorted(Path("data").rglob("*")) if path.is_file()}


def test_what_is_written_is_read_back_exactly():
    begun = begin("01", p("01"))
    x, info = (
        np.linspace(0, 1, 7, dtype=np.float32),
        {"n": np.int64(3), "shape": (1, 8), "v": np.arange(2)},
    )
    begun.write_npz("dataset.npz", x=x, y=np.arange(3))
    begun.write_json("dataset.json", info)
    begun.finish()
    begun = begin("02", p("02"))
    read = begun.read_npz("dataset.npz")
    assert (
        read["x"].dtype == np.float32 and np.array_equal(read["x"], x) and set(read) == {"x", "y"}
    )
    assert begun.read_json("dataset.json") == {"n": 3, "shape": [1, 8], "v": [0, 1]}
    weights = {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(4)[::2]}
    begun.write_safetensors("model.safetensors", weights)
    begun.write_json("model.json", {})
    table = pd.DataFrame(
        {
            "step": [1, 2],
            "phase": ["train", ""],
            "objective": [1 / 3, np.nan],
            "gradient_norm": [1e-300, np.inf],
        }
    )
    begun.write_csv("training.csv", table[["gradient_norm", "objective", "phase", "step"]])
    begun.finish()
    begun = begin("03", p("03"))
    assert all(
        torch.equal(t, weights[n]) for n, t in begun.read_safetensors("model.safetensors").items()
    )
    pd.testing.assert_frame_equal(
        begun.read_csv("training.csv"), table.astype({"phase": "str"}), check_exact=True
    )


def test_the_same_results_are_the_same_bytes(every_schema, monkeypatch):
    make("01")
    first = {k: v for k, v in snapshot().items() if k.name != "run.json"}
    later = time.time() + 100
    monkeypatch.setattr(time, "time", lambda: later)
    make("01")
    assert {k: v for k, v in snapshot().items() if k.name != "run.json"} == first


def test_run_json_says_how_files_were_made(every_schema):
    make("01")
    Path("weights.bin").write_bytes(b"w")
    begun = begin("02", p("02", depth=2, device="cpu"), dtype="float32")
    begun.record_input("weights.bin")
    begun.write_json("model.json", {})
    begun.write_safetensors("model.safetensors", {"w": torch.ones(1)})
    begun.write_csv("training.csv", frame("training.csv"))
    begun.finish()
    entry = json.loads(Path("data/runs/a/run.json").read_text())["stages"]["02"]
    assert (
        entry["parameters"] == {"run": "a", "seed": 1, "depth": 2, "device": "cpu"}
        and entry["seed"] == 1
    )
    assert entry["dtype"] == "float32" and entry["device"] == "cpu" and entry["versions"]["torch"]
    assert entry["inputs"] == {
        f: sha256(f"data/runs/a/{f}") for f in ("dataset.npz", "dataset.json")
    }
    assert entry["outputs"]["model.json"] == sha256("data/runs/a/model.json")
    assert (
        entry["outside_inputs"] == {"weights.bin": sha256("weights.bin")}
        and entry["wall_time_s"] >= 0
    )


def test_a_study_says_which_gpu_and_versions_it_used():
    folder = Path("data/runs/a")
    folder.mkdir(parents=True)
    nothing = {"parameters": {}, "inputs": {}, "outputs": {}}
    here = nothing | {"device": "cpu", "versions": {"torch": "2.13.0+cpu"}}
    there = nothing | {"device": "cuda", "versions": {"torch": "2.11.0", "gpu": "NVIDIA H200"}}
    (folder / "run.json").write_text(
        json.dumps({"run": "a", "stages": {stage: here for stage in ("01", "02", "03")}})
    )
    assert made_by("a") == {"torch": "2.13.0", "gpu": ""}
    stages = {"01": here, "02": there, "03": here, "05": there, "07": there}
    (folder / "run.json").write_text(json.dumps({"run": "a", "stages": stages}))
    assert made_by("a") == {"torch": "2.11.0, 2.13.0", "gpu": "NVIDIA H200: 02 05"}


def test_nothing_is_published_before_finish(every_schema):
    make("01")
    before = snapshot()
    begun = begin("01", p("01"))
    begun.write_npz("dataset.npz", x=np.zeros(3))
    assert begun.read_npz("dataset.npz")["x"].shape == (3,)  # its own, not yet published
    with pytest.raises(
        ValueError,
        match=r"^notebook 01 has not written dataset.json: write it before finish\(\)\.$",
    ):
        begun.finish()
    published = {k: v for k, v in snapshot().items() if not k.name.endswith(".tmp")}
    assert published == before
    make("01")
    assert not list(Path("data").rglob("*.tmp"))


def test_atomic_leaves_the_old_file_when_the_block_fails():
    Path("x.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic("x.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert Path("x.txt").read_text() == "old" and os.listdir() == ["x.txt"]
    with atomic("new/x.txt") as path:
        path.write_text("new")
    assert os.listdir("new") == ["x.txt"]


def test_a_killed_stage_leaves_what_was_there(every_schema):
    make("01")
    before = snapshot()
    program = """
        import numpy as np, os, signal
        from stages import p
        from utils.run import begin
        begun = begin("01", p("01"))
        begun.write_npz("dataset.npz", x=np.zeros(9))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert in_another_process(program).wait() == -signal.SIGKILL
    assert {k: v for k, v in snapshot().items() if not k.name.endswith(".tmp")} == before
    begin("02", p("02"))  # the lock went with the process


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence_and_loses_nothing(every_schema, monkeypatch):
    make("01")
    before, write = snapshot(), Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: write(Path("/dev/full"), text))
    begun = begin("01", p("01"))
    begun.write_npz("dataset.npz", x=np.zeros(3))
    words = (
        r"^dataset.json of run 'a' cannot be written \(no space left on device\): make room, or "
    )
    with pytest.raises(OSError, match=words):
        begun.write_json("dataset.json", {"value": 2})
    assert {k: v for k, v in snapshot().items() if not k.name.endswith(".tmp")} == before
    assert not list(Path("data").rglob("*dataset.json.tmp"))


def test_a_folder_that_cannot_be_written_is_one_sentence():
    Path("data/runs/a/.lock").mkdir(parents=True)
    with pytest.raises(
        OSError, match=r"^run 'a' cannot be written \(is a directory\): make room, "
    ):
        begin("01", p("01"))


def test_a_kill_between_two_renames_is_noticed(every_schema, monkeypatch):
    make("01")
    begun = begin("01", p("01"))
    begun.write_npz("dataset.npz", x=np.zeros(9))
    begun.write_json("dataset.json", {"value": 9})
    replace, done = os.replace, []

    def once(source, target):
        if done:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        begun.finish()
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        ValueError, match=r"^dataset.npz of run 'a' is not what notebook 01 wrote: re-run 01\.$"
    ):
        begin("02", p("02"))


def test_predecessor_missing(every_schema):
    with pytest.raises(
        FileNotFoundError, match=r"^run 'a' does not exist in data/runs/: run notebook 01 first\.$"
    ):
        begin("03", p("03"))
    assert not Path("data").exists()
    make("01")
    with pytest.raises(
        FileNotFoundError, match=r"^run 'a' has no model.safetensors: run notebook 02 first\.$"
    ):
        begin("03", p("03"))
    Path("data/runs/a/dataset.npz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^run 'a' has no dataset.npz: run notebook 01 first\.$"
    ):
        begin("02", p("02"))


def test_an_input_made_anew_is_refused_until_its_readers_ran(every_schema):
    for stage in ("01", "02", "03", "04"):
        make(stage)
    make("01", value=2.0)
    for stage in ("03", "04", "05"):
        with pytest.raises(
            ValueError,
            match=r"^dataset.npz of run 'a' has changed since notebook 02 read it: re-run 02\.$",
        ):
            begin(stage, p(stage))
    make("02", value=2.0)
    with pytest.raises(ValueError, match="has changed since notebook 03 read it: re-run 03"):
        begin("04", p("04"))
    make("03")
    make("04")
    make("05")


def test_an_equal_input_made_anew_is_accepted(every_schema):
    for stage in ("01", "02", "01", "03"):
        make(stage)


@pytest.mark.parametrize("change", [lambda b: b[:-5], lambda b: b + b"x", lambda b: b[::-1]])
def test_an_edited_or_truncated_file_is_refused(every_schema, change):
    make("01")
    path = Path("data/runs/a/dataset.npz")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"^dataset.npz of run 'a' is not what notebook 01 wrote: re-run 01\.$"
    ):
        begin("02", p("02"))


def test_a_damaged_record_is_one_sentence(every_schema):
    make("01")
    Path("data/runs/a/run.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"run.json is damaged: delete the folder data/runs/a and start"
    ):
        begin("02", p("02"))


def test_a_stage_reads_only_what_came_before(every_schema):
    make("01")
    begun = make("02")
    with pytest.raises(ValueError, match="notebook 02 cannot read bounds"):
        begun.read_csv("bounds.csv")
    with pytest.raises(ValueError, match="is not a file of notebook 02"):
        begun.write_csv("bounds.csv", frame("bounds.csv"))


def test_a_pickle_is_refused():
    begun = begin("01", p("01"))
    begun.write_npz("dataset.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        begun.read_npz("dataset.npz")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"objective": None}, "lacks the column objective"),
        ({"extra": [1]}, "has the unknown column extra"),
        ({"step": [1.5]}, "values in column step that are not int"),
        ({"step": [True]}, "values in column step that are not int"),
        ({"phase": [3]}, "values in column phase that are not str"),
        ({"objective": ["x"]}, "values in column objective that are not float"),
    ],
)
def test_a_table_that_breaks_its_schema(columns, says):
    table = frame("training.csv").assign(**{k: v for k, v in columns.items() if v})
    table = table.drop(columns=[k for k, v in columns.items() if v is None])
    begun = begin("01", p("01"))
    begun.stage = "02"
    with pytest.raises(ValueError, match=says) as caught:
        begun.write_csv("training.csv", table)
    assert "\n" not in str(caught.value)


def test_the_study_report(every_schema, monkeypatch, capsys):
    columns = {"quantity": ("str", "q"), "value": ("float", "v"), "source": ("str", "s")}
    monkeypatch.setitem(SCHEMAS, "findings.csv", columns)
    with pytest.raises(FileNotFoundError, match=r"^run 'a' has no "):
        begin("07", p("07"))
    for stage in ("01", "02", "03", "04", "05", "06"):
        make(stage)
        make(stage, run="b")
    begun = begin("07", StudyReport(study="s", runs=["b", "a"]))
    table = begun.read_runs("bounds.csv")
    assert list(table.columns) == ["run", "k", "value"] and list(table["run"]) == ["b", "a"]
    assert begun.json_of_run("model.json", "a") == {"value": 1.0}
    begun.write_csv("findings.csv", frame("findings.csv"))
    begun.write_csv("runs.csv", frame("runs.csv"))
    begun.finish()
    assert Path("data/results/s/findings.csv").is_file()
    committed = ReportStage(StudyReport(study="s", runs=[]))
    pd.testing.assert_frame_equal(committed.read_runs("bounds.csv"), table)
    pd.testing.assert_frame_equal(committed.read_about(), read_table("data/results/s/runs.csv"))
    with pytest.raises(
        FileNotFoundError, match=r"^study 's' has no blocks.csv in data/results/s: run the study"
    ):
        committed.read_runs("blocks.csv")
    never = ReportStage(StudyReport(study="never", runs=[]))
    with pytest.raises(
        FileNotFoundError,
        match=r"^study 'never' has no runs.csv in data/results/never: run the study",
    ):
        never.read_about()
    record = json.loads(Path("data/runs/_study_s/run.json").read_text())["stages"]["07"]
    assert record["inputs"]["a/bounds.csv"] == sha256("data/runs/a/bounds.csv")
    make("01", value=5.0)
    with pytest.raises(ValueError, match="of run 'a' has changed since notebook 02 read it"):
        begin("07", p("07"))


# --- the lock ------------------------------------------------------------------------------------


HOLD = """
    from stages import p
    from utils.run import begin
    begun = begin("{stage}", p("{stage}"))
    print("held", flush=True)
    input()
"""


def release(process) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def release_soon(process) -> None:
    """After the next call has begun to wait."""
    threading.Timer(0.3, release, [process]).start()


@pytest.mark.slow
def test_a_second_writer_is_refused_and_a_patient_one_waits():
    other = in_another_process(HOLD.format(stage="01"))
    assert other.stdout.readline() == "held\n"
    before = snapshot()
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"^run 'a' is in use by another process: wait for it or stop it\.$"
    ):
        begin("01", p("01"), wait_s=0.2)
    assert time.monotonic() - start < 2 and snapshot() == before
    begin("01", p("01", run="b"), wait_s=0)  # another run is free
    release_soon(other)
    begin("01", p("01"), wait_s=30)
    assert other.wait() == 0


@pytest.mark.slow
def test_the_environment_sets_the_patience(monkeypatch):
    other = in_another_process(HOLD.format(stage="01"))
    assert other.stdout.readline() == "held\n"
    monkeypatch.setenv("RUN_LOCK_WAIT", "30")
    release_soon(other)
    begin("01", p("01"))
    assert other.wait() == 0


def test_notebooks_that_read_the_same_files_work_side_by_side_and_keep_them_from_writers(
    every_schema,
):
    for stage in ("01", "02", "03", "04", "05"):
        make(stage)
    other = in_another_process(HOLD.format(stage="04"))
    try:
        assert other.stdout.readline() == "held\n"
        begin("05", p("05"), wait_s=0)
        make("06")
        for stage in ("01", "02", "03", "04"):  # 04 reads from the first three and writes the last
            with pytest.raises(RuntimeError, match="in use by another process"):
                begin(stage, p(stage), wait_s=0)
    finally:
        other.kill()
        other.wait()
    begin("02", p("02"), wait_s=0)
    assert set(record_of("a")) == {"01", "02", "03", "04", "05", "06"}


@pytest.mark.slow
def test_the_record_of_notebooks_that_finish_together_loses_none(every_schema):
    for stage in ("01", "02", "03"):
        make(stage)
    program = """
        import time
        from stages import make
        from utils.run import stage
        at_once = stage.record_of
        # between reading the record and writing it
        stage.record_of = lambda run: (at_once(run), time.sleep(0.2))[0]
        print("ready", flush=True)
        input()
        make("{stage}")
    """
    others = [in_another_process(program.format(stage=stage)) for stage in ("04", "05", "06")]
    assert all(other.stdout.readline() == "ready\n" for other in others)
    for other in others:
        release(other)
    assert [other.wait() for other in others] == [0, 0, 0]
    assert set(record_of("a")) == {"01", "02", "03", "04", "05", "06"}


def test_a_notebook_run_again_in_its_kernel_does_not_lock_itself_out():
    begin("01", p("01"), wait_s=0)
    begin("01", p("01"), wait_s=0)


def test_a_refused_stage_gives_the_lock_back(every_schema):
    make("01")
    with pytest.raises(FileNotFoundError):
        begin("03", p("03"))
    assert not locks.held
