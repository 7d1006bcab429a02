"""A trained network from what notebook 02 has written: its description and its weights."""

from __future__ import annotations

from dataclasses import asdict

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.networks.build import build_for_data, build_model
from utils.networks.copies import to_precision
from utils.networks.mlp import MLP
from utils.networks.vit import ViT

State = dict[str, Tensor]  # by name


def describe(model: nn.Module, spec: str) -> dict:
    """What `restore` needs beside the weights: the `spec` that built the `model`, and its sizes.

    Sizes are known of our own networks; "config" is None for a user's.

    >>> model = build_model("mlp", d_in=8, width=5, depth=0, n_classes=3)
    >>> describe(model, "mlp")["config"]["width"]
    5
    """
    is_ours = isinstance(model, ViT | MLP)
    return {"model": spec, "config": asdict(model.config) if is_ours else None}


def untrained(description: dict, info: dict) -> nn.Module:
    """A fresh network of the kind and sizes that `describe` wrote down.

    info  of the data set (`Dataset.info`), which a user's own function is called with

    >>> description = describe(build_model("mlp", d_in=8, width=5, depth=0, n_classes=3), "mlp")
    >>> untrained(description, {}).config.width
    5
    """
    if description["config"] is None:
        return build_for_data(description["model"], info)
    return build_model(description["model"], **description["config"])


def restore(description: dict, state: State, info: dict) -> nn.Module:
    """The trained network from the `description` that `describe` wrote and its weights.

    state  tensors by name, as `read_weights` gives them
    info   of the data set (`Dataset.info`)

    Raises ValueError where the tensors do not fit.

    >>> model = build_model("mlp", d_in=8, width=5, depth=0, n_classes=3)
    >>> again = restore(describe(model, "mlp"), model.state_dict(), {})
    >>> bool((again.layers[0].weight == model.layers[0].weight).all())
    True
    """
    return load_state(untrained(description, info), state)


def read_weights(path: str) -> State:
    """Tensors by name from the .safetensors file `path`.

    Raises ValueError where it is not there or not whole.

    >>> read_weights("nowhere.safetensors")
    Traceback (most recent call last):
    ValueError: There is no weights file nowhere.safetensors: give the path of a .safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        message = f"There is no weights file {path}: give the path of a .safetensors file."
        raise ValueError(message) from None
    except (SafetensorError, OSError) as error:
        message = f"{path} is not a whole .safetensors file ({error}): save the weights anew."
        raise ValueError(message) from None


def load_state(model: nn.Module, state: State) -> nn.Module:
    """Copy the tensors `state` by name into the `model`, which takes their dtype, and return it.

    Raises ValueError where names, shapes or kinds differ; the model is left as it was then.

    >>> load_state(nn.Linear(2, 3), nn.Linear(2, 3).double().state_dict()).weight.dtype
    torch.float64
    """
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            where = "the file" if name in own else "the model"
            raise ValueError(f"The weights do not fit the model: {where} has no {name}.")
        ours, given = own[name], state[name]
        if ours.shape != given.shape:
            raise ValueError(
                f"The weights do not fit the model: {name} has the shape {tuple(given.shape)} in "
                f"the file and {tuple(ours.shape)} in the model."
            )
        if ours.is_floating_point() != given.is_floating_point():
            raise ValueError(
                f"The weights do not fit the model: {name} has type {given.dtype} in the file and "
                f"{ours.dtype} in the model."
            )
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model = to_precision(model, dtypes.pop())
    model.load_state_dict(state)
    return model
