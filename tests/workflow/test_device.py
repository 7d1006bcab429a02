"""Where there is a GPU: the same numbers there as on the CPU, to 1e-6 in float64, by function and
by notebook."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from utils import bounds, sample_size
from utils.hessian import (
    Losses,
    hessian_block_norms,
    hessian_difference_norms,
    hessian_norm,
    hessian_trace,
    per_sample_hessian_norms,
    per_sample_losses,
    spectral_density,
)
from utils.networks import build_model
from utils.run.parameters import ModelTraining
from utils.run.start import begin
from utils.surface import difference_on_ball, spreads
from utils.surface.neighbourhood import top_eigenspace
from utils.surface.probes import neighbourhood, probe_losses
from workflow.trial import TINY, papermill, table, tree

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PARTS = ("full", "gauss_newton", "functional")


def numbers(device: str) -> dict[str, np.ndarray]:
    """What the notebooks measure, of one small network computed on `device`."""
    torch.manual_seed(0)
    sizes = {
        "image_size": 4,
        "channels": 1,
        "patch_size": 2,
        "n_classes": 3,
        "depth": 2,
        "n_heads": 2,
    }
    network = build_model("vit", **sizes, d_model=6, d_ff=8).double().to(device)
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    losses, found = (
        Losses(network, x, y),
        {"losses": per_sample_losses(network, x, y)},
    )
    for part in PARTS:
        found[f"norm {part}"] = hessian_norm(network, x, y, part=part, tolerance=1e-9).value
        found[f"norms {part}"] = per_sample_hessian_norms(
            network, x, y, part=part, tolerance=1e-9
        ).value
    found["certified"] = per_sample_hessian_norms(network, x, y, certify=True).upper
    found["pyhessian"] = hessian_norm(network, x, y, estimator="pyhessian").value
    d = hessian_difference_norms(network, x, y, [4], tolerance=1e-9)
    found["step"], found["limit"] = d.step[0].value, d.limit[0].value
    found["trace"] = hessian_trace(network, x, y, estimator="hutch++", probes=6)
    found["spectrum"] = spectral_density(network, x, y, probes=2, steps=5).count([0.1])[0]
    found["blocks"] = hessian_block_norms(network, x[:2], y[:2], tolerance=1e-9).values
    for rung in bounds.RUNGS:
        found[f"bound {rung}"] = bounds.hessian_bounds(network, x[:2], y[:2], rung=rung).values
    found["ball bound"] = bounds.hessian_bounds(
        network, x[:2], y[:2], rung="activations", radius=1e-3
    ).values
    eigen = top_eigenspace(losses, 2)
    found["eigenvalues"] = eigen.values
    found["spreads"] = list(vars(spreads(losses, 4)).values())
    for b in difference_on_ball(losses, [5], range(5), [1e-3], basis=eigen.vectors.abs(), steps=2):
        found["ball"] = [b.measured, b.value, b.gradient, b.curvature]
    probes = neighbourhood(losses.w, 0.1, 3)
    found["probes"] = probe_losses(losses, probes)
    for criterion in ("surface", "ball", "next", "step"):
        radius = 0.0 if criterion == "next" else 1e-3
        k = sample_size.required_samples(network, x, y, 0.5, radius, 0.9, criterion)
        found[f"k {criterion}"] = [k.k, k.lower, k.upper]
    return {name: np.asarray(value, dtype=float) for name, value in found.items()}


@gpu
def test_every_number_is_the_same_on_the_gpu():
    there, here = numbers("cuda"), numbers("cpu")
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


@gpu
@pytest.mark.slow
def test_notebooks_give_the_same_tables_on_the_gpu(tmp_path):
    """Trained once, on the CPU; measured on both, side by side."""
    folder, stages = tree(tmp_path), ("03", "04", "05", "06")

    def execute(run, *stages, **more):
        for stage in stages:
            done = papermill(folder, stage, **TINY | {"run": run, "retrain_sizes": []} | more)
            assert done.returncode == 0, done.stderr[-2000:]

    execute("here", "01", "02")
    given = {"device": "cuda", "weights": str(folder / "data/runs/here/model.safetensors")}
    with ThreadPoolExecutor() as pool:
        for job in (
            pool.submit(execute, "here", *stages),
            pool.submit(execute, "there", "01", "02", *stages, **given),
        ):
            job.result()
    record = json.loads((folder / "data/runs/there/run.json").read_text())["stages"]
    assert record["03"]["device"] == "cuda" and record["03"]["versions"]["gpu"]
    for file in ("per_sample_norms.csv", "hessian_norms.csv", "bounds.csv"):
        tables = [table(folder, file, run).select_dtypes("float") for run in ("here", "there")]
        a, b = (t.drop(columns=["residual"], errors="ignore") for t in tables)
        pd.testing.assert_frame_equal(a, b, rtol=1e-6, atol=1e-9)


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    p = ModelTraining.model_construct(run="a", device="cuda")
    with pytest.raises(
        ValueError, match=r"^parameter device is 'cuda' and PyTorch sees no GPU here: give cpu\.$"
    ):
        begin("02", p)


@pytest.mark.slow
def test_the_comparison_itself_runs_here():
    """The numbers above are finite and do not depend on the run, so that a difference on a GPU is
    the GPU's."""
    first, second = numbers("cpu"), numbers("cpu")
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
        assert np.isfinite(value).all() or name.startswith("k "), name
