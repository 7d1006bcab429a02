"""The copy of a model that everything works on: in evaluation mode, of one precision, without fused
kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


@contextmanager
def second_order_mode() -> Iterator[None]:
    """Attention by its mathematical kernel: the fused ones have no second derivative.

    >>> with second_order_mode():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def check_module(model: nn.Module) -> None:
    """Raise ValueError unless `model` is a module with real, finite weights that are numbers, and
    without batch normalisation.

    >>> check_module(nn.Linear(2, 3))
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("The model is a TorchScript module: give the module it was made from.")
    if not isinstance(model, nn.Module):
        raise ValueError(f"The model is a {type(model).__name__}: give a torch.nn.Module.")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("The model has no parameters: give one that has weights.")
    for name, p in parameters.items():
        _check_parameter(name, p)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"{name} is batch normalisation, whose statistics are those of a batch: fold it "
                "into the layer before it, or replace it by LayerNorm or GroupNorm."
            )


def _check_parameter(name: str, p: Tensor) -> None:
    if is_lazy(p):
        raise ValueError(f"{name} has no shape yet: call the model once on an input.")
    if p.is_meta:
        raise ValueError(f"{name} is on the meta device, without numbers: load its weights.")
    if p.is_complex():
        raise ValueError(f"{name} is complex: split it into its real and imaginary part.")
    if not p.is_floating_point():
        raise ValueError(f"{name} has type {p.dtype}: give weights in float32 or float64.")
    if not p.isfinite().all():
        raise ValueError(
            f"The weights {name} hold NaN or infinity: train the model again or load other weights."
        )


def prepared_copy(
    model: nn.Module,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A copy of `model` in evaluation mode and in `dtype`, all its weights free to move.

    device  of the copy; default: where the model is

    The model handed in keeps its `.grad`, modes and frozen weights. Complex buffers stay complex.
    Raises ValueError where the model cannot be copied, or as `check_module` does.

    >>> prepared_copy(nn.Linear(2, 3)).weight.dtype
    torch.float64
    """
    check_module(model)
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"The model cannot be copied ({first_sentence(error)}): "
            "keep tensors with a history, files and locks out of its attributes."
        ) from None
    to_precision(twin, dtype, device).eval()
    for p in twin.parameters():
        p.grad = None
        p.requires_grad_(True)
    return twin


def to_precision(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None
) -> nn.Module:
    """`model.to(dtype)` in place, of which complex buffers keep their imaginary part.

    >>> to_precision(nn.Linear(2, 3), torch.float64).bias.dtype
    torch.float64
    """
    waves = {name: b.clone() for name, b in model.named_buffers() if b.is_complex()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would take the real part; it is put back below
        model.to(device=device, dtype=dtype)
    for name, b in waves.items():
        owner, _, last = name.rpartition(".")
        wide = b.to(device=device, dtype=torch.promote_types(dtype, torch.complex64))
        setattr(model.get_submodule(owner), last, wide)
    return model


def first_sentence(error: BaseException) -> str:
    """What an error of another library says, as part of a sentence: its kind and first words.

    >>> first_sentence(RuntimeError("shapes differ. Try again"))
    'RuntimeError: shapes differ'
    """
    words = " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
