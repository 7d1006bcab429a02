"""The rung tangents: the second-order form of every node, with its tangents measured exactly.

Theorem (thm:adjoint) splits an example's Hessian, H = J^T S J + sum over nodes z of X_z'^T M_z
X_z', exactly: M_z is the matrix of < lam_z, D^2 phi_z > and X_z' the map from the weights to the
inputs of z. With R^T R = |M_z| the walk back of the rows R measures ||R X_z'|| for each group of
weights, and J^T S J follows exactly from one backward pass for each class. Here every walk is one
example's, with its leading axis free for rows: (k, *shape) are k linear forms of a value (1,
*shape).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils.bounds.subject import ROUNDING, Subject, group_of
from utils.calculus.lemmas import spectral
from utils.calculus.lowering import Step
from utils.calculus.nodes.arrays import plus
from utils.calculus.tape import Named, Tape

Visit = Callable[[int, Tensor], None]


def tangents(of: Subject, row: int) -> tuple[Tensor, Tensor]:
    """A bound of ||H||, and the matrix (m, m) that bounds its blocks, for the example `row`.

    ||H|| <= min(||J^T S J|| + ||B||, || ||blocks of J^T S J|| + B ||). Raises Unknown for a node
    without a majorant. Source: Theorem (thm:forms).
    """
    walk = Walk(of, row)
    whole, blocks = walk.gauss_newton()
    B = walk.functional()
    top, other = torch.linalg.eigvalsh(torch.stack([B, blocks + B]))[:, -1]
    return torch.minimum(whole + top, other) * ROUNDING, (blocks + B) * ROUNDING


class Walk:
    """One example's tape, and rows of forms walked back over it."""

    def __init__(self, of: Subject, row: int):
        self.tape: Tape = of.tape(torch.tensor([row], device=of.x.device))
        self.steps = self.tape.active[:-1]
        self.place = {step.output: i for i, step in enumerate(self.steps)}
        kept = {of.groups[g]: i for i, g in enumerate(of.kept)}
        self.group = {name: kept[group_of(name)] for name in self.tape.moving}
        self.m = len(kept)
        first: dict[int, int] = {}  # group -> the first step that reads its parameters
        for i, step in reversed(list(enumerate(self.steps))):
            first |= {self.group[name]: i for name in step.inputs if name in self.group}
        self.complete = {i: [g for g in first if first[g] == i] for i in set(first.values())}
        self.zeros = self.tape.losses.new_zeros(self.m)

    def back(self, rows: Named, visit: Visit) -> None:
        """Walk forms (k, *shape) of values, by name, back to the weights; visit(group, matrix) with
        the forms of all parameters of a group (k, numbers), once for each that is reached."""
        found = {name: t for name, t in rows.items() if name not in self.group}
        weights: dict[int, Named] = {}
        for name in rows.keys() - found.keys():
            self._at_weights(weights, name, rows[name])
        start = max((self.place[name] for name in found), default=-1)
        for i in reversed(range(len(self.steps))):
            here = found.pop(self.steps[i].output, None) if i <= start else None
            if here is not None:
                self._step_back(self.steps[i], here, found, weights)
            for group in self.complete.get(i, ()):
                parts = weights.pop(group, None)
                if parts:
                    visit(group, torch.cat([t.reshape(len(t), -1) for t in parts.values()], 1))

    def _step_back(self, step: Step, rows: Tensor, found: dict, weights: dict) -> None:
        wanted = self.tape.wanted[step.output]
        parts = step.node.adjoint(self.tape.saved[step.output], rows, wanted)
        for name, part, want in zip(step.inputs, parts, wanted, strict=True):
            if not want or part is None:
                continue
            if name in self.group:
                self._at_weights(weights, name, part)
            else:
                found[name] = plus(found.get(name), part)

    def _at_weights(self, weights: dict, name: str, part: Tensor) -> None:
        of_group = weights.setdefault(self.group[name], {})
        of_group[name] = plus(of_group.get(name), part)

    def reach(self, rows: Named) -> Tensor:
        """||R dx/dw_g|| (m,) of the forms R of some values together."""
        norms = self.zeros.clone()

        def visit(group: int, matrix: Tensor) -> None:
            norms[group] = spectral(matrix)

        self.back(rows, visit)
        return norms

    def gauss_newton(self) -> tuple[Tensor, Tensor]:
        """||J^T S J|| and the norms (m, m) of its blocks, exactly.

        With F_g = S^(1/2) J_g of a group and F_g^T = Q_g R_g, R_g (K, K), the block F_g^T F_g' has
        the norm of R_g R_g'^T. Source: Theorem (thm:forms).
        """
        f = self.tape.values[self.tape.chain.output]
        units = torch.eye(f.numel(), dtype=f.dtype, device=f.device).reshape(-1, *f.shape[1:])
        form = self.tape.forms()["loss"]
        S = form((units,), None)[0].flatten(1)
        values, vectors = torch.linalg.eigh((S + S.mT) / 2)
        R = f.new_zeros(self.m, len(S), len(S))

        def visit(group: int, matrix: Tensor) -> None:
            r = torch.linalg.qr(matrix.mT, mode="r").R
            R[group, : len(r)] = r

        rows = (values.clamp(min=0).sqrt() * vectors).mT.reshape(-1, *f.shape[1:])
        self.back({self.tape.chain.output: rows}, visit)
        return spectral(R.flatten(0, 1)) ** 2, spectral(R[:, None] @ R[None].mT)

    def functional(self) -> Tensor:
        """B (m, m) that bounds the blocks of sum_z X_z'^T M_z X_z'. Source: Theorem (thm:forms)."""
        B = self.zeros.new_zeros(self.m, self.m)
        for step in self.steps:
            lam = self.tape.adjoints.get(step.output)
            if lam is None:
                continue
            norms = [self._reach_of(step, root) for root in self._roots(step, lam)]
            if len(norms) == 1:
                B += torch.outer(norms[0], norms[0])
            elif norms:
                cross = torch.outer(*norms)
                B += cross + cross.mT
        return B

    def _roots(self, step: Step, lam: Tensor) -> tuple:
        shapes = [self.tape.values[name].shape[1:] for name in step.inputs]
        leaves = tuple(name in self.group for name in step.inputs)
        saved = self.tape.saved[step.output]
        return step.node.roots(saved, lam, self.tape.wanted[step.output], shapes, leaves)

    def _reach_of(self, step: Step, root: tuple | int) -> Tensor:
        """The norms (m,) of one element of `Node.roots`."""
        if isinstance(root, int):  # the identity on a parameter
            norms = self.zeros.clone()
            norms[self.group[step.inputs[root]]] = 1.0
            return norms
        rows: Named = {}
        for name, part in zip(step.inputs, root, strict=True):
            if part is not None:
                rows[name] = plus(rows.get(name), part)
        return self.reach(rows)
