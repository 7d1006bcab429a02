"""The rung tangents: roots of every node, rows walked back, the Gauss-Newton part exactly."""

from __future__ import annotations

import pytest
import torch
from bounded import chain_values, columns, norm2
from networks import NETWORKS, flat, small_first, uneven_examples
from torch.func import jacfwd

from utils.bounds.subject import subject
from utils.bounds.tangents import Walk
from utils.calculus.nodes.base import Node
from utils.hessian.derivatives import dense_hessian

F64 = torch.float64


def walk_of(name: str):
    model = NETWORKS[name]()
    x, y = uneven_examples(1, 2)
    of = subject(model, x, y, "cross_entropy")
    with torch.no_grad():
        return model, x, y, of, Walk(of, 0)


def gram(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(1).mT @ rows.flatten(1)


@pytest.mark.parametrize("name", small_first(NETWORKS))
@torch.no_grad()
def test_roots_of_every_node(name):
    """Those that a node has of its own against those of its dense majorant; beside a parameter
    |R x'| is the length of the parameter's gradient."""
    _, _, _, _, walk = walk_of(name)
    seen = 0
    for step in walk.steps:
        lam = walk.tape.adjoints.get(step.output)
        if lam is None:
            continue
        saved = walk.tape.saved[step.output]
        wanted = walk.tape.wanted[step.output]
        shapes = [walk.tape.values[n].shape[1:] for n in step.inputs]
        leaves = tuple(n in walk.group for n in step.inputs)
        found = step.node.roots(saved, lam, wanted, shapes, leaves)
        if len(found) == 2 and isinstance(found[1], int):
            place = 1 - found[1]
            other = shapes[found[1]]
            units = torch.eye(shapes[place].numel(), dtype=F64).reshape(-1, *shapes[place])
            dz = [None] * len(shapes)
            dz[place] = units
            gradients = step.node.second_order(saved, lam, wanted)(tuple(dz), None)[found[1]]
            assert gradients.shape[1:] == other
            expected = gradients.flatten(1) @ gradients.flatten(1).mT
            torch.testing.assert_close(gram(found[0][place]), expected, rtol=1e-9, atol=1e-12)
        else:
            expected = Node.roots(step.node, saved, lam, wanted, shapes, leaves)
            assert len(found) == len(expected) or not found
            for ours, dense in zip(found, expected):
                for a, b in zip(ours, dense):
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(gram(a), gram(b), rtol=1e-8, atol=1e-10)
        seen += len(found) > 0
    assert seen >= 2


@pytest.mark.parametrize("name", ["pre cls gelu", "post mean gelu", "mlp", "heads with a mask"])
def test_rows_walked_back(name):
    """||R dx/dw_g|| measured exactly for every value; the Gauss-Newton part and its blocks too, and
    the functional part bounded block by block."""
    model, x, y, of, walk = walk_of(name)
    w = flat(model)
    index = columns(model, of.groups)
    J = jacfwd(lambda w: chain_values(of.chain, model, w, x[0]))(w)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in walk.steps:
            value = walk.tape.values[step.output]
            R = torch.randn(4, *value.shape[1:], generator=generator, dtype=F64)
            matrix = R.flatten(1) @ J[step.output].reshape(-1, len(w))
            expected = torch.tensor([norm2(matrix[:, ig]) for ig in index], dtype=F64)
            measured = walk.reach({step.output: R})
            torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-11)
        whole, blocks = walk.gauss_newton()
        B = walk.functional()
    G, F = (dense_hessian(model, x, y, part=part) for part in ("gauss_newton", "functional"))
    assert whole.item() == pytest.approx(norm2(G), rel=1e-9)
    expected = torch.tensor([[norm2(G[a][:, b]) for b in index] for a in index], dtype=F64)
    torch.testing.assert_close(blocks, expected, rtol=1e-7, atol=1e-9 * norm2(G))
    expected = torch.tensor([[norm2(F[a][:, b]) for b in index] for a in index], dtype=F64)
    assert (B >= expected * (1 - 1e-9) - 1e-10 * norm2(F)).all()
