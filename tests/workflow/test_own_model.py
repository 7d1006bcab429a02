"""A user's own data and model through notebooks 01 to 06, and Run All in Jupyter."""

import json
import shutil
import sys

import numpy as np
import pytest

from utils import sample_size
from workflow.execution import NAMES
from workflow.trial import TINY, execute, papermill, table, tree

pytestmark = pytest.mark.slow

USER_MODEL = '''
import torch
from torch import nn
from torch.nn import functional as F

from utils import classes  # the user's own utils, not ours


class Net(nn.Module):
    """One block of fused attention on rows of pixels, with the library's LayerNorm."""

    def __init__(self, n_classes, side, d=8):
        super().__init__()
        self.embed, self.qkv = nn.Linear(side, d), nn.Linear(d, 3 * d)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, n_classes)

    def forward(self, x):
        h = self.embed(x[:, 0])
        normed = F.layer_norm(h, h.shape[-1:], self.norm.weight, self.norm.bias)
        q, k, v = self.qkv(normed).unsqueeze(1).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.head(self.norm(h.mean(1)))


def make(info):
    return Net(classes(info), info["input_shape"][-1])
'''


def test_run_all_in_jupyter_gives_the_same_files_as_papermill(tmp_path):
    folder = tree(tmp_path)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    out = ["--output-dir", str(tmp_path / "out"), "01_data_preparation.ipynb"]
    done = execute(folder / "notebooks", *command, *out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert papermill(folder, "01", run="second").returncode == 0
    quickstart, second = folder / "data/runs/quickstart", folder / "data/runs/second"
    assert (quickstart / "dataset.npz").read_bytes() == (second / "dataset.npz").read_bytes()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's arrays and model, whose file imports its own utils, through 01 to 06."""
    folder = tree(tmp_path_factory.mktemp("own"))
    (folder / "mine" / "utils").mkdir(parents=True)
    (folder / "mine" / "utils" / "__init__.py").write_text(
        "def classes(info):\n    return info['n_classes']\n"
    )
    (folder / "mine" / "net.py").write_text(USER_MODEL)
    generator = np.random.default_rng(0)
    y = np.arange(150) % 3
    x = generator.normal(size=(150, 1, 4, 4)) + y[:, None, None, None]
    np.savez(folder / "mine" / "data.npz", x_train=x.astype(np.float32), y_train=y)
    values = TINY | {
        "run": "own",
        "dataset": "npz:mine/data.npz",
        "model": "mine/net.py:make",
        "n_samples": 0,
    }
    for stage in list(NAMES)[:-1]:
        done = papermill(folder, stage, **values)
        assert done.returncode == 0, f"{stage}: {done.stderr[-2000:]}"
    return folder


def test_own_model_gets_every_measured_quantity(own):
    norms = table(own, "per_sample_norms.csv", "own")
    assert norms["converged"].all() and (norms["value"] > 0).all()
    assert len(table(own, "hessian_norms.csv", "own")) and len(table(own, "spectrum.csv", "own"))
    assert {"qkv", "head"} <= set(table(own, "blocks.csv", "own")["row"])
    bounds = table(own, "bounds.csv", "own")
    answered = {"certified", "prior", "prior, measured", "activations", "tangents", "majorant"}
    assert set(bounds["rung"]) == answered and (bounds["ratio"] >= 1 - 1e-9).all()
    assert len(table(own, "convergence.csv", "own").query("experiment == 'ball'")) > 0
    assert len(table(own, "sample_size.csv", "own").query("kind == 'pilot'")) == 2 * len(
        sample_size.CRITERIA
    )


def test_own_weights_skip_training(own):
    shutil.copy(own / "data/runs/own/model.safetensors", own / "mine" / "weights.safetensors")
    values = {
        "dataset": "npz:mine/data.npz",
        "model": "mine/net.py:make",
        "weights": "mine/weights.safetensors",
    }
    (own / "data/runs/given").mkdir()
    for file in ("dataset.npz", "dataset.json", "run.json"):
        shutil.copy(own / "data/runs/own" / file, own / "data/runs/given")
    done = papermill(own, "02", **TINY | values | {"run": "given"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(table(own, "training.csv", "given")) == 0
    given, first = (own / f"data/runs/{run}/model.safetensors" for run in ("given", "own"))
    assert given.read_bytes() == first.read_bytes()
    description = json.loads((own / "data/runs/given/model.json").read_text())
    assert description["l2"] == 0  # the penalty of no training


def test_samples_without_curvature(tmp_path):
    """Black images leave a ReLU network without biases flat: their Hessians are 0, and no ratio to
    them is a number."""
    folder = tree(tmp_path)
    x = np.random.default_rng(0).normal(size=(150, 1, 4, 4)).astype(np.float32)
    x[::2] = 0
    np.savez(folder / "data.npz", x_train=x, y_train=np.arange(150) % 3)
    values = (
        TINY
        | {"run": "flat", "dataset": "npz:data.npz", "model": "mlp", "activation": "relu"}
        | {"n_samples": 0, "n_pyhessian": 6}
    )
    for stage in ("01", "02", "03", "04"):
        done = papermill(folder, stage, **values)
        assert done.returncode == 0, f"{stage}: {done.stderr[-2000:]}"
    norms = table(folder, "per_sample_norms.csv", "flat")
    assert 0.2 < (norms["value"] == 0).mean() < 0.8
    estimators = table(folder, "estimators.csv", "flat").query(
        "estimator == 'pyhessian alone' and error.isna()"
    )
    assert len(estimators) and (estimators["value"] == 0).all()
    bounds = table(folder, "bounds.csv", "flat")
    assert (bounds["bound"] >= bounds["measured"] * (1 - 1e-9)).all() and (
        bounds["measured"] == 0
    ).any()
