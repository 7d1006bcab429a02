"""The majorant: -Q <= H <= Q, right where couplings are one-sided and where squares underflow."""

from __future__ import annotations

import pytest
import torch
from exact import exact_norms, reference
from networks import NETWORKS, random_mlp, random_vit, small_first, uneven_examples
from torch import nn

from utils.bounds import hessian_bounds
from utils.bounds.majorant import Majorants, majorant, uniform
from utils.bounds.subject import subject

F64 = torch.float64


@pytest.mark.parametrize("name", small_first(NETWORKS))
def test_quadratic_majorant(name):
    """Q + H and Q - H are positive semidefinite, and Q is symmetric, before and after balancing."""
    model = NETWORKS[name]()
    x, y = uneven_examples(1, 3)
    of = subject(model, x, y, "cross_entropy")
    H = reference(model, x, y)[2]
    for rounds in (0, 4):
        operator = Majorants(of, torch.tensor([0]))
        if rounds:
            operator.balance(uniform(operator.P, "majorant balance", 0, operator.rows), rounds)
        every = torch.zeros(operator.P, dtype=torch.int64)  # all unit vectors, of one example
        Q = operator(torch.eye(operator.P, dtype=F64), every)
        Q = torch.ldexp(Q, -operator.exponent)
        size = torch.linalg.matrix_norm(Q, 2)
        torch.testing.assert_close(Q, Q.mT, rtol=1e-9, atol=1e-10 * float(size))
        for difference in (Q - H, Q + H):
            least = torch.linalg.eigvalsh((difference + difference.mT) / 2)[0]
            assert least >= -1e-10 * size


def zeroed(model: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(names):
                p.zero_()
    return model


def scaled(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


def fitted() -> nn.Module:
    """Logits so far apart that the first class has a loss near 1e-260."""
    model = random_vit(1, 0.7)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([600.0, 0.0, 0.0]))
    return model


HARD = {
    "head weights zero": lambda: zeroed(random_vit(1, 0.7), "head.weight"),
    "head zero": lambda: zeroed(random_vit(1, 0.7, eps=1e-6), "head.weight", "head.bias"),
    "last gain zero": lambda: zeroed(random_vit(1, 0.7), "1.norm.weight", "norm.weight"),
    "gain of a block zero": lambda: zeroed(random_vit(1, 0.7, depth=2), "blocks.0.norm1.weight"),
    "all gains zero": lambda: zeroed(
        random_vit(1, 0.7), "norm1.weight", "norm2.weight", "norm.weight"
    ),
    "fitted": fitted,
    "tiny weights": lambda: scaled(random_mlp(2), 1e-130),
    "two layers zero": lambda: zeroed(random_mlp(2, depth=2), "layers.2.weight", "layers.3.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_one_sided_couplings_and_tiny_curvature(name):
    """Within 10 of the exact norm, and not below it, where the gradient moves one side only."""
    model = HARD[name]()
    x, _ = uneven_examples(3, 0)
    y = torch.tensor([0, 2, 1])
    exact = exact_norms(model, x, y)
    bound = hessian_bounds(model, x, y, rung="majorant", confidence=1 - 1e-9)
    assert (bound.values >= exact * (1 - 1e-9)).all()
    assert (bound.terms["lower"] <= 10 * exact).all()
    tangents = hessian_bounds(model, x, y, rung="tangents").values
    assert (tangents >= exact * (1 - 1e-9)).all() and tangents.isfinite().all()


def test_alone_and_together():
    """The same matrix alone and together; too few steps certify nothing."""
    model = random_mlp(6)
    x, y = uneven_examples(4, 6)
    together = hessian_bounds(model, x, y, rung="majorant", max_steps=400)
    alone = [
        hessian_bounds(model, x[i : i + 1], y[i : i + 1], rung="majorant", max_steps=400)
        for i in range(4)
    ]
    lower = torch.cat([bound.terms["lower"] for bound in alone])
    torch.testing.assert_close(together.terms["lower"], lower, rtol=1e-9, atol=0)
    assert (together.values >= lower).all() and together.blocks is None
    of = subject(model, x, y, "cross_entropy")
    small_chunks = majorant(of, max_steps=400, memory=1)["lower"]
    torch.testing.assert_close(small_chunks, lower, rtol=1e-9, atol=0)
    assert hessian_bounds(model, x, y, rung="majorant", max_steps=2).values.isinf().all()
