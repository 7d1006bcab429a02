"""How far the Hessian of one sample can grow in a ball of weight space: a comparison system from the exact centre.

Weights move as w = w_0 + U c, |c| <= R. Every step z = phi(inputs) of the network whose phi bends (D^2 phi != 0) is a
source: its output may be pushed, z + e. With s, t among the sources and the weights themselves (source 0, s = c)

    F_zs = sup ||d in_z / ds||    how the inputs of step z move with s
    L_st = sup ||d^2 l / ds dt||  so that L_00 = sup ||U^T H U||
    l_z  = sup |dl / dz|          the adjoint, D_z = sup of the way of in_z from its value at the centre

over the ball of radius r satisfy, with K_z(s, t) >= ||D^2 phi_z[in_z's, in_z't]|| and K3_z for D^3 phi,

    F_xs' <= sum over z  F_xz K_z(0, s)         l_z' <= L_z0         D_z' <= F_z0
    L_st' <= sum over z  l_z K3_z(s, t, 0) + L_zs K_z(t, 0) + L_zt K_z(s, 0) + L_z0 K_z(s, t) .

The right sides are sums of products of nonnegative unknowns with constants of the nodes and nondecreasing in all of
them, so that a solution of the system with the exact values at r = 0 lies above the suprema for as long as it exists:
it blows up at a finite radius, where the answer is inf. Source: Theorem (thm:comparison).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from utils import bounds, calculus
from utils.calculus import Step
from utils.forms import spectral
from utils.models import LOSSES, ViT, prepared_copy

SOFTMAX_THIRD = 0.5  # >= ||D^3 s||, attained; also <= 2 ||Ds||. Source: Lemma (lem:third)
LAYER_NORM_THIRD = 3.0  # >= d rho^3 ||D^3 n||, attained. Source: Lemma (lem:third)
GROWTH = 0.03  # a step of the integration may raise the rate of ||H|| by about twice this share


# --- the linearised network of one sample -----------------------------------------------------------------


class _Walks:
    """`copies` copies of one sample: tangents of all values, and of all adjoints, along as many directions at once."""

    def __init__(self, chain: list[Step], point: dict[str, Tensor], x: Tensor, moving: set[str], copies: int):
        self.chain, self.saved, self.alive = chain, [], set(moving)
        self.values = dict(point) | {"x": x.expand(copies, *x.shape[1:])}
        for step in chain:
            self.values[step.output], saved = step.node.forward(*(self.values[name] for name in step.inputs))
            self.saved.append(saved)
            if self.alive.intersection(step.inputs):
                self.alive.add(step.output)
        self.adjoints = self._back({chain[-1].output: torch.ones_like(self.values[chain[-1].output])}, None)
        self.forms = [
            step.node.second_order(saved, self.adjoints[step.output])
            if step.node.second_order is not None and step.output in self.alive
            else None
            for step, saved in zip(chain, self.saved)
        ]

    def _back(self, found: dict[str, Tensor], tangents: dict[str, Tensor] | None) -> dict[str, Tensor]:
        for i in reversed(range(len(self.chain))):
            step, parts = self.chain[i], []
            if step.output not in self.alive:
                continue
            if step.output in found:
                parts.append(step.node.adjoint(self.saved[i], found[step.output]))
            if tangents is not None and self.forms[i] is not None:
                dz = tuple(tangents.get(name) for name in step.inputs)
                parts.append(self.forms[i](dz, tangents.get(step.output)))
            for part in parts:
                for name, value in zip(step.inputs, part):
                    if value is not None and name in self.alive:
                        found[name] = found[name] + value if name in found else value
        return found

    def tangents(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        """z' by name along tangents (copies, ...) of parameters, or along a push of one step's output."""
        found = dict(direction)
        for step, saved in zip(self.chain, self.saved):
            if any(name in found for name in step.inputs):
                moved = step.node.tangent(saved, tuple(found.get(name) for name in step.inputs))
                found[step.output] = moved + found[step.output] if step.output in found else moved
        return found

    def adjoint_tangents(self, tangents: dict[str, Tensor]) -> dict[str, Tensor]:
        """The derivative of dl/dz along the same direction, for every value by name."""
        return self._back({}, tangents)


def _bends(step: Step, alive: set[str]) -> bool:
    """Whether D^2 phi acts on what moves: on the input, or on both factors of a product."""
    inputs = step.inputs[:2] if isinstance(step.node, calculus.BILINEAR) else step.inputs[:1]
    return step.node.second_order is not None and all(name in alive for name in inputs)


def _centred(t: Tensor, dim: int = -1) -> Tensor:
    return t - t.mean(dim, keepdim=True)


def _inputs_of(step: Step, found: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Tangents of the inputs as D^2 phi sees them, each (B, parts, entries); the second for a product only.

    One part for each row of a node that acts on rows, for each column where the factor is LayerNorm's gain. Softmax
    and cross-entropy ignore constants, keys may be centred over the tokens (softmax follows), values too (rows of A'
    sum to 0). Source: Lemma 5 (lem:bilinear), part (iii).
    """
    first, second = (found.get(name) for name in (*step.inputs[:2], None)[:2])
    node = step.node
    if not isinstance(node, calculus.BILINEAR):
        if first is None:
            return None, None
        if isinstance(node, calculus.Softmax | calculus.Normalisation | calculus.CrossEntropy):
            first = _centred(first)
        width = 1 if isinstance(node, calculus.Activation) else first.shape[-1]
        return first.reshape(len(first), -1, width), None
    if isinstance(node, calculus.Score | calculus.Mixing) and second is not None:
        second = _centred(second, 1)
    if isinstance(node, calculus.Score) and first is not None:
        first = first / math.sqrt(first.shape[-1] // node.H)
    if first is not None:
        first = first.mT if isinstance(node, calculus.Affine) else first.reshape(len(first), 1, -1)
    return first, None if second is None else second.reshape(len(second), 1, -1)


def _output_of(step: Step, t: Tensor) -> Tensor:
    """The part of a push that D^2 phi can produce: rows with sum 0 for softmax and LayerNorm."""
    return _centred(t) if isinstance(step.node, calculus.Softmax | calculus.Normalisation) else t


def _matrices_of(step: Step, t: Tensor) -> Tensor:
    """An adjoint of the step's output as (B, parts, a, b): matrix products, one column for `Affine`, or rows."""
    node = step.node
    if isinstance(node, calculus.Score):  # (B, H, N_q, N)
        return t
    if isinstance(node, calculus.Mixing):  # (B, N_q, d) -> (B, H, N_q, d_h)
        return t.unflatten(-1, (node.H, -1)).transpose(1, 2)
    if isinstance(node, calculus.Affine):  # its inputs are met column by column, so the adjoint as a whole
        return t.reshape(len(t), 1, -1, 1)
    if isinstance(node, calculus.Linear):
        return t[:, None]
    return t.reshape(len(t), -1, 1, 1 if isinstance(node, calculus.Activation) else t.shape[-1])


def _stacked(parts: tuple[Tensor | None, ...], counts: list[int]) -> Tensor | None:
    """Tangents of successive directions as one tensor; None is zero."""
    some = next((t for t in parts if t is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(n, *some.shape[1:]) if t is None else t for t, n in zip(parts, counts)])


def _part_norms(t: Tensor) -> Tensor:
    """||s -> part|| of tangents (B, parts, entries): (parts,)."""
    return spectral(t.transpose(0, 1))


def _coupling(t: Tensor) -> Tensor:
    """>= max over |s| <= 1 and parts of the spectral norm of the (a, b) matrix, for t (B, parts, a, b).

    The smallest of the three flattenings (s | a b), (s a | b), (s b | a) of every part.
    """
    t = t.transpose(0, 1)  # (parts, B, a, b)
    shapes = (t.flatten(2), t.flatten(1, 2), t.transpose(2, 3).flatten(1, 2))
    return torch.stack([spectral(M) for M in shapes]).amin(0).max()


# --- the centre -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Directions:
    """The columns of U: of chosen parameters each coordinate times a scale, or given tensors (q, *shape) by name."""

    point: dict[str, Tensor]
    scales: dict[str, float]
    given: dict[str, Tensor] | None = None

    @property
    def names(self) -> set[str]:
        return set(self.scales if self.given is None else self.given)

    def __len__(self):
        if self.given is not None:
            return len(next(iter(self.given.values())))
        return sum(self.point[name].numel() for name in self.scales)

    def chunks(self, size: int) -> Iterator[dict[str, Tensor]]:
        """At most `size` columns at a time, as tangents of the parameters by name."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            if self.given is not None:
                yield {name: t[start:stop] for name, t in self.given.items()}
                continue
            found, first = {}, 0
            for name, scale in self.scales.items():
                shape, last = self.point[name].shape, first + self.point[name].numel()
                low, high = max(start, first), min(stop, last)
                if low < high:
                    t = self.point[name].new_zeros(stop - start, last - first)
                    t[torch.arange(low, high) - start, torch.arange(low, high) - first] = scale
                    found[name] = t.reshape(-1, *shape)
                first = last
            yield found

    def project(self, parts: dict[str, Tensor], B: int) -> Tensor:
        """U^T of gradients (B, *shape) by name, 0 where one is missing: (B, q)."""
        if self.given is not None:
            terms = [parts[name].flatten(1) @ t.flatten(1).T for name, t in self.given.items() if name in parts]
            return sum(terms, self.point[next(iter(self.given))].new_zeros(B, len(self)))
        flat = {name: parts.get(name, t.new_zeros(B, t.numel())).reshape(B, -1) for name, t in self.point.items()}
        return torch.cat([scale * flat[name] for name, scale in self.scales.items()], 1)


@dataclass
class System:
    """The comparison system of n samples: the unknowns at the centre, and what its right side needs.

    steps   the Z steps that bend, the loss last; source z + o is the output of step z, o = `offset`; source 0 are the
            weights that move, source o - 1 those of the Hessian, which may be others; d is the width of LayerNorm
    F       (n, 3, Z, S): both inputs of a product jointly, weighted so that they balance, then each alone
    L       (n, S, S), adjoint (n, Z)
    weak    for each step: (n, S) a bound of the adjoint's derivative as D^2 phi of a product meets it, or for the
            others (n, rows, S) row by row
    rows    for each step without product: (F by rows (n, rows, S), adjoint by rows (n, rows), local (n, rows)), local
            being |act''|, ||Ds||, rho, or the norm of the loss's Hessian in the logits
    Source: Theorem (thm:comparison).
    """

    steps: list[Step]
    offset: int
    d: int
    F: Tensor
    L: Tensor
    adjoint: Tensor
    weak: list[Tensor]
    rows: list[tuple[Tensor, Tensor, Tensor] | None]

    @property
    def start(self) -> Tensor:
        """All unknowns of each sample, (n, m): L, F, adjoints, and the ways of the rows, which start at 0."""
        ways = [self.F.new_zeros(len(self.F), local.shape[1]) for _, _, local in filter(None, self.rows)]
        return torch.cat([self.L.flatten(1), self.F.flatten(1), self.adjoint, *ways], 1)

    @property
    def norm_at(self) -> int:
        """Where ||H|| stands among the unknowns."""
        return (self.offset - 1) * (self.L.shape[-1] + 1)

    def named(self, u: Tensor) -> dict[str, Tensor]:
        """The unknowns by name: "L", "F", "adjoint", and "ways", one tensor (n, rows) for each step that has rows."""
        sizes = [self.L[0].numel(), self.F[0].numel(), self.adjoint.shape[1]]
        sizes += [r[2].shape[1] for r in self.rows if r is not None]
        L, F, adjoint, *ways = u.split(sizes, 1)
        return {
            "L": L.view(-1, *self.L.shape[1:]),
            "F": F.view(-1, *self.F.shape[1:]),
            "adjoint": adjoint,
            "ways": ways,
        }

    def rates(self, u: Tensor) -> Tensor:
        """The right side at unknowns (n, m). Nondecreasing in every unknown."""
        now = self.named(u)
        L, F, ways = now["L"], now["F"], iter(now["ways"])
        moved_L, moved_F = L - self.L, F[:, 0] - self.F[:, 0]
        dL, dways, K0 = torch.zeros_like(L), [], []
        for z, step in enumerate(self.steps):
            z_source = z + self.offset
            joint, first, second = F[:, :, z].unbind(1)  # (n, S)
            Lz = L[:, z_source]
            weak = self.weak[z] + (moved_L[:, z_source] if self.rows[z] is None else moved_L[:, None, z_source])
            if self.rows[z] is None:  # a product: |x'||y''| + |x''||y'|
                K = torch.minimum(bounds.outer(joint, joint), bounds.outer(first, second) + bounds.outer(second, first))
                weak = torch.minimum(weak, Lz)
                dL += _symmetric(weak[..., None] * K[:, :1]) + weak[:, 0, None, None] * K
            else:
                rows, adjoint, local = self.rows[z]
                rows = torch.minimum(rows + moved_F[:, None, z], joint[:, None])
                adjoint = torch.minimum(
                    adjoint + (now["adjoint"] - self.adjoint)[:, z : z + 1], now["adjoint"][:, z : z + 1]
                )
                second, third = _constants(step, self.d, local, next(ways))
                bent = (second[..., None] * rows).amax(1)
                K = torch.minimum(bounds.outer(bent, joint), bounds.outer(joint, bent))
                weak = (second[..., None] * torch.minimum(weak, Lz[:, None])).amax(1)
                both = bounds.outer(joint, joint)
                dL += _symmetric(torch.minimum(Lz[..., None] * K[:, :1], weak[..., None] * both[:, :1]))
                dL += torch.minimum(Lz[:, 0, None, None] * K, weak[:, 0, None, None] * both)
                bent = ((third * adjoint)[..., None] * rows).amax(1)
                one = torch.minimum(bounds.outer(bent, joint), bounds.outer(joint, bent)) * joint[:, :1, None]
                dL += torch.minimum(one, both * bent[:, :1, None])
                dways.append(rows[..., 0])
            K0.append(K[:, 0])
        dF = F[..., self.offset :] @ torch.stack(K0, 1)[:, None]
        dadjoint = L[:, self.offset :, 0]
        return torch.cat([dL.flatten(1), dF.flatten(1), dadjoint, *dways], 1)


def _symmetric(M: Tensor) -> Tensor:
    return M + M.mT


def _constants(step: Step, d: int, local: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """(>= ||D^2 phi||, >= ||D^3 phi||) of every row (n, rows), within `way` of the centre.

    Source: Lemmas 1-4 (lem:softmax, lem:cross-entropy, lem:layernorm, lem:activations), Lemma (lem:third).
    """
    node = step.node
    if isinstance(node, calculus.Activation):
        third = bounds.ACTIVATION_THIRD[node.name]
        return (local + third * way).clamp(max=bounds.ACTIVATION_BOUNDS[node.name][1]), torch.full_like(way, third)
    if isinstance(node, calculus.Normalisation):
        rho = (local - way / math.sqrt(d)).clamp(min=math.sqrt(node.eps))
        second = (bounds.LAYER_NORM_SECOND / rho**2).clamp(max=bounds.LAYER_NORM_UNIFORM / node.eps) / math.sqrt(d)
        return second, LAYER_NORM_THIRD / (d * rho**3)
    if isinstance(node, calculus.SquaredError):
        return local, torch.zeros_like(way)
    # ||Ds|| changes by sqrt(6)/9 |t'| at most, and by a factor e^{max t' - min t'}
    first = bounds.softmax_moved(local, way)
    second = bounds.softmax_second(first)
    if isinstance(node, calculus.CrossEntropy):  # the gradient in the logits is a softmax less a constant
        return first, second
    return second, (2 * first).clamp(max=SOFTMAX_THIRD)


def _local(step: Step, value: Tensor) -> Tensor:
    """The number of each row (1, rows) from which `_constants` starts, at the input of the step."""
    node = step.node
    if isinstance(node, calculus.Activation):
        return calculus.activation_derivatives(node.name, value)[1].abs().flatten(1)
    if isinstance(node, calculus.Normalisation):
        return (_centred(value).square().mean(-1) + node.eps).sqrt().flatten(1)
    if isinstance(node, calculus.SquaredError):
        return value.new_full((1, 1), 2 / value[0].numel())
    return bounds.softmax_first(value.softmax(-1)).flatten(1)


class _Measurement:
    """The exact norms of one sample x (1, ...), y (1,) at `point`, by dense Jacobians: fills a `System`.

    weights: the directions that move, and those of the Hessian where they are others. chunk: most directions at once.
    """

    def __init__(self, steps, point, x, y, loss: str, d: int, weights: list[_Directions], chunk: int):
        self.steps, self.point, self.x, self.y, self.loss = steps, point, x, y, loss
        self.weights, self.chunk, self.moving = weights, chunk, set().union(*(w.names for w in weights))
        one = self.walks(1)
        self.bent = [step for step in one.chain if _bends(step, one.alive)]
        if not self.bent:
            raise ValueError("No selected parameter has an influence on the loss: select others.")
        o, Z = len(weights), len(self.bent)
        S = Z + o
        values, adjoints = one.values, [_output_of(step, one.adjoints[step.output]) for step in self.bent]
        adjoint = torch.stack([t.norm() for t in adjoints])[None]
        self.balance = x.new_ones(Z)
        self.system = System(self.bent, o, d, x.new_zeros(1, 3, Z, S), x.new_zeros(1, S, S), adjoint, [], [])
        for step, t in zip(self.bent, adjoints):
            if isinstance(step.node, calculus.BILINEAR):
                self.system.rows.append(None)
                self.system.weak.append(x.new_zeros(1, S))
                continue
            local = _local(step, values[step.inputs[0]])
            per_row = t[:, None] if step.output == "loss" else _matrices_of(step, t).flatten(2).norm(dim=-1)
            self.system.rows.append((x.new_zeros(1, local.shape[1], S), per_row, local))
            self.system.weak.append(x.new_zeros(1, local.shape[1], S))
        for s in reversed(range(o)):  # those of the Hessian first: they choose the balance of the products
            for t, gradient in enumerate(self.column(s, weights[s].chunks(chunk))):
                if s == t:
                    self.system.L[0, s, s] = torch.linalg.eigvalsh((gradient + gradient.mT) / 2).abs().max()
                else:
                    self.system.L[0, s, t] = self.system.L[0, t, s] = spectral(gradient[None])[0]
        for z, step in enumerate(self.bent[:-1]):
            shape = values[step.output].shape[1:]
            units = torch.eye(shape.numel(), dtype=x.dtype, device=x.device).reshape(-1, *shape)
            self.column(z + o, ({step.output: _output_of(step, part)} for part in units.split(chunk)))

    def walks(self, copies: int) -> _Walks:
        chain = [*self.steps, Step(calculus.LOSS_NODES[self.loss](self.y.expand(copies)), ("f",), "loss")]
        return _Walks(chain, self.point, self.x, self.moving, copies)

    def column(self, s: int, pushes) -> list[Tensor]:
        """All norms of source s, and the derivatives of U^T gradient along it, (directions, q), for all weights."""
        inputs, adjoints, gradients, counts, walks = [], [], [], [], None
        for push in pushes:
            copies = len(next(iter(push.values())))
            if walks is None or copies != len(walks.values["x"]):
                walks = self.walks(copies)
            tangents = walks.tangents(push)
            back = walks.adjoint_tangents(tangents)
            counts.append(copies)
            inputs.append([_inputs_of(step, tangents) for step in self.bent])
            adjoints.append([self.adjoint_of(step, back, walks) for step in self.bent[:-1]])
            gradients.append([w.project(back, copies) for w in self.weights])
        for z, step in enumerate(self.bent):
            first, second = (_stacked(p, counts) for p in zip(*(chunk[z] for chunk in inputs)))
            self.fill_inputs(s, z, step, first, second)
        for z, step in enumerate(self.bent[:-1]):
            self.fill_adjoint(s, z, step, torch.cat([chunk[z] for chunk in adjoints]))
        return [torch.cat(parts) for parts in zip(*gradients)]

    @staticmethod
    def adjoint_of(step: Step, back: dict, walks: _Walks) -> Tensor:
        found = back.get(step.output)
        return torch.zeros_like(walks.values[step.output]) if found is None else _output_of(step, found)

    def fill_inputs(self, s: int, z: int, step: Step, first: Tensor | None, second: Tensor | None) -> None:
        F, rows = self.system.F[0, :, z, s], self.system.rows[z]
        norms = F.new_zeros(1) if first is None else _part_norms(first)
        if rows is not None:
            if first is not None:
                F[0], rows[0][0, :, s] = spectral(first.flatten(1)[None])[0], norms
            return
        scales = self.weights[s].scales if s < len(self.weights) and self.weights[s].given is None else {}
        orthogonal = step.inputs[1] in scales  # a factor that is itself a coordinate of the weights
        F[1] = norms.max()
        F[2] = scales[step.inputs[1]] if orthogonal else 0.0 if second is None else _part_norms(second).max()
        if s == len(self.weights) - 1 and F[1] > 0 and F[2] > 0:
            self.balance[z] = F[2] / F[1]
        root = self.balance[z].sqrt()
        F[0] = torch.maximum(F[1] * root, F[2] / root)
        if not orthogonal and first is not None and second is not None:
            both = torch.cat([first * root, (second / root).expand(-1, first.shape[1], -1)], 2)
            F[0] = torch.minimum(_part_norms(both).max(), torch.hypot(F[1] * root, F[2] / root))

    def fill_adjoint(self, s: int, z: int, step: Step, moved: Tensor) -> None:
        L, o = self.system.L, len(self.weights)
        if s <= z + o:
            L[0, z + o, s] = L[0, s, z + o] = spectral(moved.flatten(1)[None])[0]
        parts = _matrices_of(step, moved)
        product = self.system.rows[z] is None
        self.system.weak[z][0, ..., s] = _coupling(parts) if product else _part_norms(parts.flatten(2))


# --- the integration --------------------------------------------------------------------------------------


def integrate(rates: Callable[[Tensor], Tensor], u: Tensor, radii, at: int = 0, factors=(), ceiling: float = 1e6):
    """Upper solutions of u' = rates(u), rates >= 0 and nondecreasing: rigorous steps until it blows up.

    u (n, m) >= 0 at radius 0, each row a system of its own. A step of length h is right if some v >= u + h rates(v)
    is found: u(r + s) <= u + s rates(v) then for all s <= h. Returns upper bounds of u[:, at] at the ascending radii,
    (n, len(radii)), and for each factor the radius up to which it is at most factor times its start,
    (n, len(factors)). Where no step is found, or u[:, at] passes `ceiling` times its start, the bounds are inf.
    Source: Theorem (thm:comparison).
    """
    if not all(1 <= factor < math.inf for factor in factors):
        raise ValueError(f"factors are {factors}: give finite numbers >= 1.")
    radii = torch.as_tensor(radii, dtype=u.dtype, device=u.device)
    limits = torch.as_tensor(factors, dtype=u.dtype, device=u.device) * u[:, at, None]
    values, reached = u.new_full((len(u), len(radii)), torch.inf), u.new_zeros(len(u), len(factors))
    start, open_limit = u[:, at].clone(), torch.ones_like(limits, dtype=torch.bool)
    values[:, radii == 0] = start[:, None]
    r, h, idle = u.new_zeros(len(u)), u.new_full((len(u),), 1e-6), u.new_zeros(len(u), dtype=torch.long)
    last = radii.max() if len(radii) else u.new_zeros(())
    going = (r < last) | open_limit.any(1)
    rate = rates(u)
    while going.any():
        guess = rate
        for _ in range(12):
            v = u + (1 + GROWTH) * h[:, None] * guess
            found = rates(v)
            guess = torch.maximum(guess, found)
            enclosed = (u + h[:, None] * found * (1 + 1e-13) <= v).all(1) & found.isfinite().all(1)
            if enclosed[going].all():
                break
        slow = (found[:, at] <= (1 + 2 * GROWTH) * rate[:, at]) | (rate[:, at] == 0)  # any step leaves rest
        good = going & enclosed & slow
        for k, radius in enumerate(radii.tolist()):
            inside = good & (r < radius) & (radius <= r + h)
            values[inside, k] = u[inside, at] + (radius - r[inside]) * found[inside, at]
        way = torch.where(found[:, at, None] > 0, (limits - u[:, at, None]) / found[:, at, None], torch.inf)
        crossed = torch.minimum(way, h[:, None])
        reached = torch.where(good[:, None] & open_limit, r[:, None] + crossed, reached)
        open_limit &= ~(good[:, None] & (way < h[:, None]))
        u = torch.where(good[:, None], (u + h[:, None] * found) * (1 + 1e-14), u)
        r, idle = torch.where(good, r + h, r), torch.where(good, 0, idle + 1)
        calm = found[:, at] <= (1 + GROWTH) * rate[:, at]
        h = torch.where(good, torch.where(calm, 2 * h, 1.05 * h), h / 2)
        rate = torch.where(good[:, None], rates(u), rate)
        far = r > 1e9
        reached = torch.where((far & (rate == 0).all(1))[:, None] & open_limit, torch.inf, reached)  # at rest
        going &= ((r < last) | open_limit.any(1)) & (idle < 60) & ((u[:, at] <= ceiling * start) | (start == 0)) & ~far
        h = torch.where(going, h, 0.0)
    return values, reached


# --- the public face --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BallBound:
    """Upper bounds of sup over |c| <= R of ||H_i(w_0 + U c)||, samples first.

    radii (k,); values (n, k), inf where the system has blown up; centre (n,): ||H_i(w_0)||; factors and reach
    (n, len(factors)): up to these radii the bound is at most factor times the centre.
    """

    radii: Tensor
    values: Tensor
    centre: Tensor
    factors: tuple[float, ...]
    reach: Tensor


def comparison_system(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str = "cross_entropy",
    parameters: list[str] | None = None,
    directions: dict[str, Tensor] | None = None,
    scales: dict[str, float] | None = None,
    whole: bool = False,
    chunk: int = 256,
) -> System:
    """The unknowns of all samples at the model's weights; arguments as in `hessian_norm_on_ball`."""
    _check(model, x, y, loss, parameters, directions, scales, whole)
    twin = prepared_copy(model)
    point = {name: p.detach() for name, p in twin.named_parameters()}
    x = calculus.data_of(twin, x.to(next(iter(point.values())).device, torch.float64))
    chosen = {name: 1.0 for name in point if parameters is None or any(fnmatchcase(name, p) for p in parameters)}
    for pattern, scale in (scales or {}).items():
        if not any(fnmatchcase(name, pattern) for name in chosen):
            raise ValueError(f"scales names {pattern!r}, and no parameter that moves matches it.")
        chosen |= {name: float(scale) for name in chosen if fnmatchcase(name, pattern)}
    if not chosen:
        raise ValueError(f"No parameter matches {parameters}: take patterns from the model's named_parameters.")
    weights = [_Directions(point, chosen)]
    if directions is not None:
        moved = {name: t.to(x) for name, t in directions.items()}
        weights = [_Directions(point, {}, moved), *(weights if whole else [])]
    steps, d = calculus.steps_of(twin), twin.config.d_model if isinstance(twin, ViT) else 1
    with torch.no_grad():
        parts = [
            _Measurement(steps, point, x[i : i + 1], y[i : i + 1].to(x.device), loss, d, weights, chunk).system
            for i in range(len(x))
        ]
    first = parts[0]
    rows = [None if r[0] is None else tuple(torch.cat(t) for t in zip(*r)) for r in zip(*(p.rows for p in parts))]
    weak = [torch.cat(t) for t in zip(*(p.weak for p in parts))]
    F, L, adjoint = (torch.cat([getattr(p, name) for p in parts]) for name in ("F", "L", "adjoint"))
    r = bounds.ROUNDING
    rows = [None if t is None else (t[0] * r, t[1] * r, t[2]) for t in rows]
    return System(first.steps, first.offset, d, F * r, L * r, adjoint * r, [t * r for t in weak], rows)


def hessian_norm_on_ball(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | list[float],
    loss: str = "cross_entropy",
    parameters: list[str] | None = None,
    directions: dict[str, Tensor] | None = None,
    scales: dict[str, float] | None = None,
    whole: bool = False,
    factors: tuple[float, ...] = (2.0, 10.0, 100.0),
    ceiling: float = 1e6,
) -> BallBound:
    """Bound sup over the ball |c| <= R of ||U^T H_i(w_0 + U c) U|| for each sample and radius, by comparison.

    model: a `ViT` or `MLP` of utils.models with GELU, left unchanged. x: inputs, y: classes (n,). parameters: name
    patterns (fnmatch) of the weights that move, all if None. scales: pattern -> length of the unit of c in these
    parameters, 1 if not named, so that each group has a radius of its own. directions: tensors (q, *shape) by name in
    place of both: the weights move by sum_k c_k directions[k]; with `whole` the Hessian is still that in `parameters`
    (and `scales`), and only the ball is in the directions. ceiling: bounds above that many times the centre are
    given as inf, which saves their time.
    Cost: dense Jacobians of all intermediate values, of the gradient too: for small networks. Rounding of the
    measured norms is covered to 1e-10 relative.

    Raises ValueError for another module, ReLU, or options that do not fit. Source: Theorem (thm:comparison).
    """
    radii = torch.as_tensor(radius, dtype=torch.float64).reshape(-1)
    if len(radii) == 0 or not bool(((radii >= 0) & radii.isfinite()).all()):
        raise ValueError(f"radius is {radius}: give one or more finite numbers >= 0.")
    system = comparison_system(model, x, y, loss, parameters, directions, scales, whole)
    order = radii.argsort()
    values, reach = integrate(system.rates, system.start, radii[order], system.norm_at, factors, ceiling)
    values = values[:, order.argsort()].cpu()
    return BallBound(
        radii, values * bounds.ROUNDING, system.start[:, system.norm_at].cpu(), tuple(factors), reach.cpu()
    )


@dataclass(frozen=True)
class PathCertificate:
    """Balls whose union covers a path of weights as far as `covered`; on each, ||H_i|| <= factor ||H_i(centre)||.

    largest (n,): a bound of ||H_i|| on all of them. positions, radii (count,): of the centres along the path. length:
    of the whole path; measured: how many centres were tried. The path is certified where covered >= length.
    """

    largest: Tensor
    positions: Tensor
    radii: Tensor
    covered: float
    length: float
    measured: int


def certified_path(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    points: list[dict[str, Tensor]],
    factor: float = 2.0,
    loss: str = "cross_entropy",
    parameters: list[str] | None = None,
    tube: bool = False,
    most: int = 1000,
) -> PathCertificate:
    """Certify ||H_i||, in `parameters`, on the path of straight segments between the points, for all samples at once.

    points: tensors by parameter name, two or more; a parameter that a point does not name stays as in the model.
    factor > 1: each ball is as large as the comparison lets ||H_i|| stay below that many times its value at the centre.
    tube: the balls are full ones in `parameters`, so that a neighbourhood of the path is certified too; without it each
    is a piece of the segment, which is longer. A centre lies nine tenths of the last radius beyond what is covered,
    and nearer if its own ball does not reach back. most: centres measured at most.
    Source: Theorem (thm:comparison).
    """
    if not 1 < factor < math.inf or len(points) < 2:
        raise ValueError(f"factor is {factor} and there are {len(points)} points: give a factor > 1 and two points.")
    twin = prepared_copy(model)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    if any(name not in start or t.shape != start[name].shape for point in points for name, t in point.items()):
        raise ValueError("A point does not fit the model: give tensors by the names of its named_parameters.")
    if tube and parameters is not None:
        outside = [n for n in {n for p in points for n in p} if not any(fnmatchcase(n, p) for p in parameters)]
        if any(not torch.equal(p.get(n, start[n]), start[n].to(p.get(n, start[n]))) for p in points for n in outside):
            raise ValueError("The path leaves the parameters of its tube: let tube be False, or name all that move.")
    points = [start | {name: t.detach().to(start[name]) for name, t in point.items()} for point in points]
    largest = torch.zeros(len(x), dtype=torch.float64)
    positions, radii, done, measured, complete = [], [], 0.0, 0, True
    lengths = [sum((b[n] - a[n]).square().sum().item() for n in a) ** 0.5 for a, b in itertools.pairwise(points)]
    if not 0 < sum(lengths) < math.inf:
        raise ValueError(f"The path has length {sum(lengths)}: give different, finite points.")
    for (a, b), length in zip(itertools.pairwise(points), lengths):
        covered, gap = 0.0, 0.0
        if length == 0 or not complete:
            continue
        line = {name: ((b[name] - a[name]) / length)[None] for name in a}
        where = {"parameters": parameters} if tube else {"parameters": parameters, "directions": line, "whole": True}
        while covered < length and measured < most:
            at = min(covered + gap, length)
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    p.copy_(a[name] + at * line[name][0])
            system = comparison_system(twin, x, y, loss, **where)
            measured += 1
            _, reach = integrate(system.rates, system.start, [], system.norm_at, (factor,))
            radius = reach.min().item() * (1 - 1e-9)
            if radius <= 0:
                break
            gap = 0.9 * radius
            if radius >= at - covered:
                positions.append(done + at)
                radii.append(radius)
                largest = torch.maximum(largest, factor * bounds.ROUNDING * system.start[:, system.norm_at].cpu())
                covered = at + radius
        complete = covered >= length
        done += min(covered, length)
    return PathCertificate(largest, torch.tensor(positions), torch.tensor(radii), done, sum(lengths), measured)


def _check(model, x, y, loss, parameters, directions, scales, whole) -> None:
    if not calculus.known(model):
        raise ValueError(
            f"The comparison system knows only the networks of utils.models as they are, not {type(model).__name__}: "
            "use the certified measured norm, which applies to any module."
        )
    if model.config.activation == "relu":
        raise ValueError("The Hessian of a ReLU network says nothing about a ball: use gelu.")
    if isinstance(model, ViT) and model.config.eps <= 0:
        raise ValueError("A LayerNorm has eps = 0, so its derivatives are unbounded: give the model a positive eps.")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")
    bounds.check_samples(model, x, y)
    if any(not 0 <= scale < math.inf for scale in (scales or {}).values()):
        raise ValueError(f"scales are {scales}: give finite numbers >= 0.")
    if directions is not None and parameters is not None and not whole:
        raise ValueError("The Hessian is that along the directions: leave parameters out, or give whole=True.")
    if directions is None:
        if whole:
            raise ValueError("whole=True asks for directions that differ from the Hessian's weights: give directions.")
        return
    shapes = {name: p.shape for name, p in model.named_parameters()}
    counts = {len(t) for t in directions.values()}
    if (
        len(counts) != 1
        or 0 in counts
        or any(t.shape[1:] != shapes.get(name) or not bool(t.isfinite().all()) for name, t in directions.items())
    ):
        raise ValueError("directions do not fit: give finite tensors (q, *shape) by parameter name, one q for all.")
