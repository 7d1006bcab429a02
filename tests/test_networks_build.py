"""What a specification builds, what a user's own file may do, and restoring from files."""

import os
import sys

import pytest
import torch
from networks import images, tiny_mlp, tiny_vit
from refusal import refused
from safetensors.torch import save_file

from utils.networks import (
    build,
    build_for_data,
    describe,
    load_state,
    read_weights,
    restore,
    untrained,
)
from utils.networks.copies import prepared_copy

INFO = {"input_shape": [2, 4, 4], "n_classes": 3, "name": "tiny"}


def test_build_for_data_completes_the_sizes():
    sizes = dict(patch_size=2, depth=1, n_heads=2, d_model=6, d_ff=5)
    vit = build_for_data("vit", INFO, **sizes)
    assert (vit.config.image_size, vit.config.channels, vit.config.n_classes) == (4, 2, 3)
    mlp = build_for_data(
        "mlp", INFO, **sizes
    )  # takes d_model as its width and leaves what it has not
    assert (mlp.config.d_in, mlp.config.width, mlp.config.depth, mlp.config.n_classes) == (
        32,
        6,
        1,
        3,
    )
    assert build_for_data("mlp", {"input_shape": [7], "n_classes": 2}, **sizes).config.d_in == 7
    for shape in ([7], [1, 4, 6]):
        data = {"input_shape": shape, "n_classes": 2}
        refused(lambda data=data: build_for_data("vit", data, **sizes), "mlp")
    refused(lambda: build_for_data("resnet", INFO), "own")


def user_folder(tmp_path, package):
    """A folder whose model file imports its own `utils`, a package or one file."""
    folder = tmp_path / "their code"
    if package:
        (folder / "utils").mkdir(parents=True)
        (folder / "utils" / "__init__.py").write_text("")
        (folder / "utils" / "models.py").write_text("WIDTH = 7\nOWNER = 'user'\n")
        line = "from utils.models import OWNER, WIDTH"
    else:
        folder.mkdir()
        (folder / "utils.py").write_text("WIDTH = 7\nOWNER = 'user'\n")
        line = "from utils import OWNER, WIDTH"
    (folder / "net.py").write_text(
        f"""import math
import torch
{line}

assert OWNER == "user"


class Net(torch.nn.Module):
    def __init__(self, info):
        super().__init__()
        self.a = torch.nn.Linear(math.prod(info["input_shape"]), WIDTH)
        self.b = torch.nn.Linear(WIDTH, info["n_classes"])

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flatten(1))))


def make(info):
    model = Net(info)
    info.clear()  # a copy: the caller's stays whole
    return model


def broken(info):
    raise RuntimeError("inside")


def number(info):
    return 3


constant = 4
"""
    )
    return folder / "net.py"


def our_modules():
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] == "utils"}


@pytest.mark.parametrize("package", [True, False])
def test_user_file_with_its_own_utils(tmp_path, package):
    path = user_folder(tmp_path, package)
    before = our_modules()
    search = list(sys.path)
    info = dict(INFO)
    model = build_for_data(f"{path}:make", info, depth=3)
    assert model.a.weight.shape == (7, 32) and info == INFO
    after = our_modules()
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert sys.path == search and sys.modules["utils.networks.build"] is build
    from utils.networks.build import build_for_data as again

    assert again is build_for_data
    # it goes on working after our modules are back, copies included
    x = images(3, channels=2)
    expected = model(x.float()).double()
    torch.testing.assert_close(prepared_copy(model)(x), expected, rtol=1e-5, atol=1e-6)


def test_user_file_that_fails_leaves_our_modules(tmp_path):
    path = user_folder(tmp_path, True)
    search = list(sys.path)
    refused(lambda: build_for_data(f"{path}:broken", INFO), "RuntimeError: inside", "broken")
    assert sys.modules["utils.networks.build"] is build and sys.path == search
    for spec in (
        f"{path}:number",
        f"{path}:missing",
        f"{path}:constant",
        f"{tmp_path}/none.py:make",
    ):
        refused(lambda spec=spec: build_for_data(spec, INFO))
        assert sys.modules["utils.networks.build"] is build and sys.path == search


WRONG_FILES = {
    "syntax": ("def make(info) return 3", "SyntaxError"),
    "import": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "key": ("def make(info): return info['classes']", "KeyError: 'classes'"),
    "two lines": ("def make(info): raise ValueError('one\\ntwo')", "one two"),
    "exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "no weights": ("from torch import nn\nmake = lambda info: nn.Tanh()", "no parameters"),
    "state": (
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def get_extra_state(self): return {'epoch': 3}\n"
        "    def set_extra_state(self, state): pass\n"
        "make = lambda info: Net(2, 3)",
        "could not be saved",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_user_files_that_fail_say_so_in_a_sentence(tmp_path, name):
    text, said = WRONG_FILES[name]
    (tmp_path / "net.py").write_text(text)
    refused(lambda: build_for_data(f"{tmp_path}/net.py:make", INFO), said)


def test_what_a_user_file_sets_is_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
import os, torch
os.chdir("/")
torch.set_default_dtype(torch.float64)
torch.set_num_threads(3)
make = lambda info: torch.nn.Linear(2, 3)
"""
    (tmp_path / "net.py").write_text(text)
    before = torch.get_num_threads()
    build_for_data(f"{tmp_path}/net.py:make", INFO)
    assert (os.getcwd(), torch.get_num_threads()) == (str(tmp_path), before)
    assert torch.get_default_dtype() == torch.float32


def test_describe_and_restore(tmp_path):
    x = images(3, channels=2)
    user = f"{user_folder(tmp_path, True)}:make"
    for spec, model in (
        ("vit", tiny_vit(3, channels=2, norm="post", pool="mean", eps=0.1, activation="relu")),
        ("mlp", tiny_mlp(d_in=32, depth=2, bias=True)),
        (user, build_for_data(user, INFO).double()),
    ):
        file = tmp_path / "w.safetensors"
        save_file(model.state_dict(), file)
        again = restore(describe(model, spec), read_weights(str(file)), INFO)
        assert next(again.parameters()).dtype == torch.float64
        assert torch.equal(again(x), model(x))
        fresh = untrained(describe(model, spec), INFO)
        assert describe(fresh, spec) == describe(model, spec)
        assert fresh.state_dict().keys() == model.state_dict().keys()


def test_weights_that_do_not_fit(tmp_path):
    model = tiny_vit()
    other = tiny_vit(depth=2)
    file = tmp_path / "w.safetensors"
    save_file(other.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-9])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wrong_shape = {name: t[..., :1].clone() for name, t in model.state_dict().items()}
    for call in (
        lambda: load_state(model, other.state_dict()),
        lambda: load_state(model, wrong_shape),
        lambda: load_state(model, {}),
        lambda: read_weights(str(file)),
        lambda: read_weights(str(tmp_path / "missing.safetensors")),
        lambda: read_weights(str(tmp_path)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    # the weights' dtype is taken over
    assert load_state(tiny_vit().float(), before).pos.dtype == torch.float64
