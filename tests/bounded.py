"""Dense derivatives of the values of a chain, in the groups of parameters that bounds speak of."""

from __future__ import annotations

import copy

import torch
from networks import flat
from torch import Tensor, nn


def moved(model: nn.Module, step: Tensor) -> nn.Module:
    """A copy whose parameters are moved by a vector (P,)."""
    twin = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(flat(model) + step, twin.parameters())
    return twin


def by_name(model: nn.Module, w: Tensor) -> dict[str, Tensor]:
    """A vector (P,) as tensors by name."""
    parts = w.split([p.numel() for p in model.parameters()])
    named = zip(model.named_parameters(), parts, strict=True)
    return {name: part.view(p.shape) for (name, p), part in named}


def columns(model: nn.Module, groups: list[str]) -> list[Tensor]:
    """The coordinates of the flat vector that belong to each group."""
    places = {group: [] for group in groups}
    start = 0
    for name, p in model.named_parameters():
        owner = name.rsplit(".", 1)[0]
        if owner in places:
            places[owner] += range(start, start + p.numel())
        start += p.numel()
    return [torch.tensor(places[group]) for group in groups]


def norm2(M: Tensor) -> float:
    """The spectral norm of a matrix, 0 of an empty one."""
    return float(torch.linalg.matrix_norm(M.detach(), 2)) if M.numel() else 0.0


def bilinear_norm(T: Tensor, rounds: int = 6) -> float:
    """A lower estimate of max |T(u, v)| over unit u, v, for T (z, p, q), by alternating
    maximisation."""
    if float(T.abs().max()) == 0:
        return 0.0
    best = 0.0
    energy = T.square().sum((0, 2))
    for start in (energy.argmax(), energy.argmin()):
        u = torch.full((T.shape[1],), 1e-3, dtype=T.dtype)
        u[start] = 1.0
        for _ in range(rounds):
            along = torch.einsum("zpq,p->zq", T, u / u.norm())
            v = torch.linalg.svd(along, full_matrices=False).Vh[0]
            _, S, Vh = torch.linalg.svd(torch.einsum("zpq,q->zp", T, v), full_matrices=False)
            u = Vh[0]
            best = max(best, float(S[0]))
    return best


def chain_values(chain, model: nn.Module, w: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Every value of the chain for one example at the flat weights w, by name."""
    values = {name: t[None] for name, t in by_name(model, w).items()}
    values |= {name: t[None] for name, t in model.named_buffers()}
    for name, t in chain.constants.items():
        real = t.is_floating_point() or (name.startswith("number ") and t.dtype != torch.bool)
        values[name] = t.to(w) if real else t
    values[chain.input] = x[None, None]
    for step in chain.steps:
        values[step.output] = step.node.forward(*(values[name] for name in step.inputs))[0]
    return {step.output: values[step.output] for step in chain.steps}
