"""Notebooks 01 to 07 executed with tiny parameters, by Snakemake and by papermill, and judged by
their result files."""

import json
import shutil
import sys

import numpy as np
import pytest
import yaml
from stages import make

from utils.bounds import RUNGS
from utils.run.files import sha256
from utils.run.layout import WRITES
from utils.run.tables import read_table
from workflow.execution import NAMES
from workflow.trial import TINY, execute, last_line, papermill, snakemake, table, tree

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]  # one worker, one study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of one tiny run, made by Snakemake: all seven notebooks."""
    folder = tree(tmp_path_factory.mktemp("study"))
    (folder / "studies" / "tiny.yaml").write_text(
        yaml.safe_dump({"name": "tiny", "runs": [{"run": "tiny", "parameters": TINY}]})
    )
    done = snakemake(folder, "tiny", "--cores", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_stage_wrote_its_files_and_its_record(study):
    record = json.loads((study / "data/runs/tiny/run.json").read_text())["stages"]
    for stage, files in list(WRITES.items())[:-1]:
        assert set(record[stage]["outputs"]) == set(files)
        for file in files:
            assert sha256(study / "data/runs/tiny" / file) == record[stage]["outputs"][file]
        assert record[stage]["seed"] == 1 and record[stage]["versions"]["torch"]


def test_what_follows_a_changed_result_is_out_of_date(study):
    marker = study / "data/runs/tiny/notebooks/02_model_training.done"
    before = marker.read_text()
    assert sha256(study / "data/runs/tiny/model.safetensors") in before

    def planned(text):
        marker.write_text(text)
        done = snakemake(study, "tiny", "-n", "--cores", "1")
        assert done.returncode == 0, done.stderr[-2000:]
        return {stage for stage in NAMES if f"notebook_{stage}" in done.stdout + done.stderr}

    try:
        assert planned(before) == set()  # made again, with the same result
        assert planned(before.replace(before[:64], 64 * "0")) == {"03", "04", "05", "06", "07"}
    finally:
        marker.write_text(before)


def test_training_ended_where_the_record_says(study):
    model = json.loads((study / "data/runs/tiny/model.json").read_text())
    history = table(study, "training.csv")
    assert (
        list(history["phase"]).count("adam") == 2
        and history["objective"].iloc[-1] < history["objective"].iloc[0]
    )
    assert model["converged"] == (model["gradient_norm"] <= model["threshold"])
    assert model["hessian_asymmetry"] < 1e-12 and model["hessian_error"] < 1e-5


def test_norms_have_residuals_and_certificates_hold(study):
    norms = table(study, "per_sample_norms.csv")
    assert (norms.groupby("part").size() == 12).all() and norms["converged"].all()
    certified = norms[norms["upper"].notna()]
    assert len(certified) == 4 and (certified["lower"] <= certified["upper"]).all()
    assert (certified["value"] <= certified["upper"] * (1 + 1e-9)).all()


def test_hessians_of_means_and_their_differences(study):
    norms = table(study, "hessian_norms.csv")
    orders = norms[norms["order"] > 0]
    assert set(orders["matrix"]) == {"H_k", "H_k - H_n", "H_k+1 - H_k"} and len(orders) == 2 * 2 * 3
    assert (orders["residual"] <= 2e-3 * orders["value"]).all() and orders["converged"].all()
    M = table(study, "per_sample_norms.csv")["upper"].max()
    assert M > 0 and list(norms.loc[norms["k"] == 0, "matrix"]) == [
        "slope of H_k - H_n",
        "slope of H_k+1 - H_k",
    ]
    parts = norms[norms["order"] == 0].query("k > 0").set_index("part")["value"]
    assert parts["full"] <= (parts["gauss_newton"] + parts["functional"]) * (1 + 1e-6)


def test_estimators_stand_beside_an_exact_norm(study):
    estimators = table(study, "estimators.csv")
    small = estimators[estimators["matrix"] == "small Hessian"].set_index("estimator")
    assert set(small.index) == {"exact", "lanczos", "eigsh", "pyhessian", "pyhessian alone"}
    assert (small["error"].drop("pyhessian alone").abs() < 1e-8).all()
    alone = estimators[
        (estimators["matrix"] != "small Hessian") & (estimators["estimator"] == "pyhessian alone")
    ]
    assert (
        len(alone) == 4 and (alone["error"] < 1e-6).all()
    )  # power iteration never overshoots a norm


def test_blocks_and_spectrum(study):
    blocks = table(study, "blocks.csv")
    for _, b in blocks.groupby("weights"):
        matrix = b.pivot(index="row", columns="column", values="value").to_numpy()
        np.testing.assert_array_equal(matrix, matrix.T)
        assert matrix.shape == (9, 9) and (matrix >= 0).all()
    assert set(blocks["weights"]) == {"untrained", "trained"}
    spectrum = table(study, "spectrum.csv")
    for _, s in spectrum.groupby("sign"):
        assert s.sort_values("threshold")["count"].is_monotonic_decreasing
        assert ((s["low"] <= s["count"]) & (s["count"] <= s["high"])).all()


def test_no_bound_lies_below_the_measured_norm(study):
    bounds = table(study, "bounds.csv")
    assert set(bounds["rung"]) == {*RUNGS, "prior, measured", "certified"}
    assert (bounds["bound"] >= bounds["measured"] * (1 - 1e-9)).all()


def test_one_step_changes_obey_the_exact_expectation_for_networks_and_for_random_numbers(study):
    convergence = table(study, "convergence.csv")
    rms = convergence.query("experiment == 'one step' and quantity == 'rms'")
    assert set(rms["weights"]) == {
        "trained",
        "untrained network",
        "shuffled labels",
        "random numbers",
    }
    for _, group in rms.groupby(
        "weights"
    ):  # 30 orders: the mean square is within a factor of its expectation
        assert 0.5 < (group["value"] ** 2).sum() / (group["theory_low"] ** 2).sum() < 2
    slopes = convergence.query("quantity == 'slope' and experiment == 'one step'")
    assert len(slopes) == 4 and slopes["value"].between(-1.4, -0.6).all()
    near = convergence.query("experiment == 'neighbourhood' and quantity == 'rms'")
    assert set(near["weights"]) == {"uniform", "gaussian", "eigenspace"} and set(
        near["radius"]
    ) == {1e-4, 1e-2}
    for _, group in near.groupby(["weights", "radius"]):
        assert 0.4 < (group["value"] ** 2).sum() / (group["theory_low"] ** 2).sum() < 2.5


def test_balls_are_below_what_is_proved(study):
    convergence = table(study, "convergence.csv")
    for experiment in ("ball", "distance on ball"):
        ball = convergence[convergence["experiment"] == experiment].pivot_table(
            index=["k", "radius"], columns="quantity", values="value", aggfunc="first"
        )
        total = ball[["value", "gradient", "curvature", "remainder"]].sum(axis=1)
        assert len(ball) == 4 and (ball["measured"] <= total * (1 + 1e-9)).all()
        probes = ball[["found random", "found gradient", "found eigenspace"]].max(axis=1)
        assert (ball["measured"] >= probes).all()
        assert (ball["measured"] <= ball["proved" if experiment == "ball" else "bound"]).all()


def test_verdicts_have_controls_and_no_proved_bound_fails(study):
    verdicts = table(study, "verdicts.csv")
    assert verdicts["claim"].is_unique and len(verdicts) > 30
    ours = verdicts[verdicts["whose"].str.match("thm:|cor:|prop:excess")]
    assert len(ours) >= 10 and "violated" not in set(ours["verdict"])
    published = verdicts[verdicts["whose"].str.contains("UH|CCG|CAP|P182")]
    assert (published["control"] != "").all()
    concluded = verdicts[
        verdicts["verdict"].isin(["agrees", "differs", "holds", "violated", "proves nothing"])
    ]
    assert (concluded["control"] != "").all() and len(concluded) > 20
    assert not concluded.query("verdict in ['agrees', 'holds'] and not control_failed").size
    steps = verdicts[verdicts["claim"].str.startswith("slope of the one-step change")]
    assert (
        len(steps) == 4
        and steps["control_failed"].all()
        and set(steps["verdict"]) <= {"agrees", "differs"}
    )
    curvature = verdicts[
        verdicts["claim"].str.startswith("a slope of -1 at fixed weights shows")
    ].iloc[0]
    assert curvature["verdict"] in ("proves nothing", "differs") and not curvature["control_failed"]
    assert (verdicts.query("pooled == 'counts'")["trials"] > 0).all() and verdicts[
        "low"
    ].isna().any()
    again = table(study, "convergence.csv").query(
        "experiment == 'retraining' and quantity == 'excess'"
    )
    assert list(again["k"]) == [10, 20, 40] and (again["n"] == 2).all()


def test_sample_sizes_fall_with_the_tolerance(study):
    sizes = table(study, "sample_size.csv")
    for _, group in sizes.query("kind == 'pilot'").groupby("criterion"):
        assert group.sort_values("tolerance")["k"].is_monotonic_decreasing
        assert (group["lower"] <= group["upper"]).all()
    curve = sizes.query("kind == 'curve'")
    assert {"answer", "truth on held-out data", "one step", "power law"} <= set(curve["criterion"])
    kept = sizes[sizes["criterion"] == "surface, held-out S"]
    assert len(kept) == 2 and (kept["verdict"] == "kept").all()


def test_report_has_findings_and_figures(study):
    findings = read_table(study / "data/results/tiny/findings.csv")
    assert set(findings["question"]) == {"1 curvature", "2 convergence", "3 sample size"}
    assert "VIOLATED" not in set(findings["verdict"])
    pictures = sorted(p.name for p in (study / "figures/tiny").iterdir())
    stems = {p.rsplit(".", 1)[0] for p in pictures}
    assert len(stems) >= 4 and pictures == sorted(
        f"{s}.{e}" for s in stems for e in ("csv", "pdf", "png")
    )


def test_the_report_comes_from_the_committed_tables_alone(study):
    """The same findings and plotted numbers without the folders of the runs."""
    kept = {
        p: p.read_bytes()
        for d in ("data/results/tiny", "figures/tiny")
        for p in (study / d).glob("*.csv")
    }
    (study / "data/results/tiny/findings.csv").unlink()
    (study / "data/runs").rename(study / "data/away")
    try:
        done = papermill(study, "07", study="tiny", runs=[])
    finally:
        shutil.rmtree(study / "data/runs")
        (study / "data/away").rename(study / "data/runs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(kept) >= 12 and all(path.read_bytes() == content for path, content in kept.items())


def test_papermill_by_hand_gives_the_same_files(study):
    for stage in ("01", "02"):
        done = papermill(study, stage, **TINY | {"run": "by_hand"})
        assert done.returncode == 0, done.stderr[-2000:]
    for file in ("dataset.npz", "dataset.json", "model.safetensors", "model.json", "training.csv"):
        by_hand, by_snakemake = (study / "data/runs" / run / file for run in ("by_hand", "tiny"))
        assert by_hand.read_bytes() == by_snakemake.read_bytes()


DEAD = {
    "run": "tiny",
    "model": "mlp",
    "activation": "relu",
    "d_model": 1,
    "depth": 40,
    "epochs": 0,
    "polish_steps": 0,
}


@pytest.mark.parametrize(
    ("stage", "parameters", "words"),
    [
        ("01", {"run": "../x"}, "run"),
        ("01", {"run": "bad", "dataset": "digitz"}, "digits"),
        ("01", {"run": "bad", "dataset": "npz:missing.npz"}, "missing.npz"),
        ("02", {"run": "tiny", "depth": 0}, "depth"),
        ("02", {"run": "tiny", "weights": "nowhere.safetensors"}, "nowhere.safetensors"),
        ("02", DEAD, "dead"),
        ("03", {"run": "never"}, "01"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_changes_nothing(study, stage, parameters, words):
    before = {p: p.read_bytes() for p in (study / "data/runs/tiny").iterdir() if p.is_file()}
    done = papermill(study, stage, **parameters)
    assert done.returncode != 0
    line = last_line(done)
    assert words in line and line.rstrip().endswith(".") and "Error: " in line
    assert before == {
        p: p.read_bytes() for p in (study / "data/runs/tiny").iterdir() if p.is_file()
    }


def test_unknown_parameter_is_refused(study):
    command = [sys.executable, "-m", "papermill", f"notebooks/{NAMES['02']}.ipynb", "out.ipynb"]
    given = ["-p", "run", "tiny", "-p", "depht", "3", "--cwd", "."]
    done = execute(study, *command, *given)
    assert done.returncode != 0 and "depht" in last_line(done) and "depth" in last_line(done)


def test_stage_on_a_changed_input_is_refused(study, monkeypatch):
    shutil.copytree(study / "data/runs/tiny", study / "data/runs/stale")
    monkeypatch.chdir(study)
    make("01", run="stale")
    done = papermill(study, "03", **TINY | {"run": "stale"})
    assert done.returncode != 0 and "re-run 02" in last_line(done)


# Stands before papermill on the path of `python -m`: the first call ends with the message, the next
# leaves what notebook 01 would.
FIRST_FAILS = """
import shutil, sys
from pathlib import Path
if not Path("called").exists():
    Path("called").touch()
    sys.exit({message!r})
shutil.copy(sys.argv[1], sys.argv[2])
for name in ("dataset.npz", "dataset.json", "run.json"):
    Path("data/runs/quickstart", name).touch()
"""


@pytest.mark.parametrize(
    "message, again",
    [("zmq.error.ZMQError: Address already in use (addr)", True), ("E: no.", False)],
)
def test_a_kernel_whose_port_was_taken_starts_again(tmp_path, message, again):
    folder = tree(tmp_path)
    (folder / "papermill").mkdir()
    (folder / "papermill" / "__init__.py").touch()
    (folder / "papermill" / "__main__.py").write_text(FIRST_FAILS.format(message=message))
    done = snakemake(folder, "quickstart", "--cores", "1", "--until", "notebook_01")
    assert (done.returncode == 0) == again and (folder / "called").exists()
    assert (folder / "data/runs/quickstart/dataset.npz").exists() == again
    assert again or "E: no." in done.stderr
