"""A network from a specification: "vit", "mlp", or PATH.py:function for a user's own."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from utils.networks.copies import check_module, first_sentence
from utils.networks.mlp import MLP, MLPConfig
from utils.networks.vit import ViT, ViTConfig

KINDS = {"vit": (ViT, ViTConfig), "mlp": (MLP, MLPConfig)}


def build_model(kind: str, **sizes: int | float | str | bool) -> nn.Module:
    """A fresh network, its weights drawn from torch's global generator.

    kind   "vit" or "mlp"
    sizes  the fields of its configuration, `ViTConfig` or `MLPConfig`

    Raises ValueError for another kind, and for sizes that do not fit.

    >>> build_model("mlp", d_in=8, width=5, depth=0, n_classes=3).layers[0].weight.shape
    torch.Size([5, 8])
    """
    if kind not in KINDS:
        raise ValueError(f"model is {kind!r}: choose vit, mlp, or PATH.py:function for your own.")
    module, config = KINDS[kind]
    try:
        return module(config(**sizes))
    except TypeError as error:
        raise ValueError(f"The sizes of {kind!r} do not fit: {error}.") from None


def build_for_data(spec: str, info: dict, **sizes: int | float | str | bool) -> nn.Module:
    """The model that the notebooks train, fresh.

    spec   "vit", "mlp" or "PATH.py:function"; the user's function is called with a copy of `info`,
           takes no sizes and returns an `nn.Module`
    info   of the data set (`Dataset.info`): its "input_shape" and "n_classes" complete `sizes`
    sizes  of which each kind takes what it has; for "mlp" the width is `d_model`

    Raises ValueError for another spec, for sizes that do not fit the data, where PATH.py has no
    such function or fails, and for a network that cannot be measured or saved.

    >>> info = {"input_shape": [1, 4, 4], "n_classes": 3}
    >>> build_for_data("mlp", info, d_model=5, depth=1, n_heads=2).config.d_in
    16
    """
    if ".py:" in spec:
        return _user_network(spec, info)
    if spec in KINDS:
        sizes = sizes | _sizes_of_data(spec, tuple(info["input_shape"]), sizes)
        taken = {field.name for field in fields(KINDS[spec][1])}
        sizes = {name: value for name, value in sizes.items() if name in taken}
    return build_model(spec, n_classes=info["n_classes"], **sizes)


def _sizes_of_data(kind: str, shape: tuple[int, ...], sizes: dict) -> dict:
    if kind == "mlp":
        return {"d_in": math.prod(shape), "width": sizes.get("d_model")}
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"model vit needs square images (C, S, S) and the data have shape {shape}: use mlp."
        )
    return {"image_size": shape[1], "channels": shape[0]}


# --- a user's own file --------------------------------------------------------------------------


def _user_network(spec: str, info: dict) -> nn.Module:
    named, function = spec.rsplit(":", 1)
    path = Path(named).resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {named}: give model as PATH.py:function.")
    with _own_imports(path.parent), _settings_kept():
        try:
            build = getattr(_executed(path), function, None)
            model = build(copy.deepcopy(info)) if callable(build) else None
        except (Exception, SystemExit) as error:  # of the user's code, whatever it is
            raise ValueError(f"{spec} failed ({first_sentence(error)}): correct it.") from error
    if not callable(build):
        raise ValueError(
            f"{path.name} has no function {function!r}: give model as PATH.py:function."
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{spec} returned {type(model).__name__}: it has to return a torch.nn.Module."
        )
    check_module(model)
    check_state(model)
    return model


def check_state(model: nn.Module) -> None:
    """Raise ValueError where the weights of `model` cannot be written to a file after training.

    >>> check_state(nn.Linear(2, 3))
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"{name} in the state of the model is no dense tensor, so that the weights could "
                "not be saved: keep it out of the state, or make it a buffer."
            )


def _executed(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"user_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _settings_kept() -> Iterator[None]:
    """What a user's file may set stays as it was: default type, threads, working directory."""
    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    folder = os.getcwd()
    try:
        yield
    finally:
        os.chdir(folder)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _modules_named_utils() -> dict[str, ModuleType]:
    modules = sys.modules.items()
    return {name: module for name, module in modules if name.split(".")[0] == "utils"}


@contextmanager
def _own_imports(folder: Path) -> Iterator[None]:
    """Import from `folder` first, with its own `utils`, if it has one, in place of ours."""
    search_path = list(sys.path)
    has_utils = (folder / "utils").is_dir() or (folder / "utils.py").is_file()
    ours = _modules_named_utils() if has_utils else {}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = search_path
        if has_utils:
            for name in _modules_named_utils():
                del sys.modules[name]
        sys.modules.update(ours)
