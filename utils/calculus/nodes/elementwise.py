"""Functions entry by entry: activations, and any other, whose derivatives automatic differentiation
gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad

from utils.calculus.nodes.arrays import absolute, aligned, plus, sum_to
from utils.calculus.nodes.base import Form, Node, Parts


def gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """GELU'(z), GELU''(z). Source: Lemma 4 (lem:activations)."""
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density, density * (2 - z.square())


def gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of GELU's approximation by tanh. Source: Lemma 4 (lem:activations)."""
    c = math.sqrt(2 / math.pi)
    a = 0.044715
    t = torch.tanh(c * (z + a * z**3))
    sech2 = 1 - t.square()
    slope = c * (1 + 3 * a * z.square())
    bend = 6 * c * a * z
    first = (1 + t) / 2 + z * sech2 * slope / 2
    return first, sech2 * slope + z * sech2 * (bend / 2 - t * slope.square())


def relu(z: Tensor) -> tuple[Tensor, Tensor]:
    """Slope 0 at the kink, as in torch; the second derivative is 0 almost everywhere."""
    return (z > 0).to(z.dtype), torch.zeros_like(z)


class Derivatives:
    """The first and second derivatives of an elementwise function at z, computed when they are
    first asked for.

    `first` has the derivative in each moving input, `second` the nonzero ones in each pair of them.
    """

    def __init__(self, node: Elementwise, z: tuple[Tensor, ...]):
        self.node = node
        self.z = z

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        return self.node.derivatives(self.z[0])

    @cached_property
    def first(self) -> dict[int, Tensor]:
        if self.node.derivatives is not None:
            return {0: self._known[0]}
        return {i: self._slope(i)(*self.z) for i in self._real}

    @cached_property
    def second(self) -> dict[tuple[int, int], Tensor]:
        if self.node.derivatives is not None:
            found = {(0, 0): self._known[1]}
        else:
            pairs = [(i, j) for i in self._real for j in self._real]
            found = {(i, j): self._bend(i, j)(*self.z) for i, j in pairs}
        return {pair: t for pair, t in found.items() if t.any()}

    @property
    def _real(self) -> list[int]:
        return [i for i, t in enumerate(self.z) if t.is_floating_point()]

    def _slope(self, i: int) -> Callable[..., Tensor]:
        return lambda *z: grad(lambda *w: self.node.function(*w).sum(), i)(*z)

    def _bend(self, i: int, j: int) -> Callable[..., Tensor]:
        return lambda *z: grad(lambda *w: self._slope(i)(*w).sum(), j)(*z)


class Elementwise(Node):
    """function(z_1, z_2, ...) entry by entry of inputs broadcast to one shape.

    derivatives: z -> (f'(z), f''(z)) where there is one input and they are known; otherwise they
    come from automatic differentiation of the function itself, once for a batch.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        shape: Sequence[int],
        inner: Sequence[Sequence[int]],
        derivatives: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ):
        self.function = function
        self.shape = tuple(shape)
        self.inner = [tuple(s) for s in inner]
        self.derivatives = derivatives

    def forward(self, *z: Tensor) -> tuple[Tensor, Derivatives]:
        if len(z) > 1:
            z = tuple(torch.broadcast_tensors(*(aligned(t, len(self.shape)) for t in z)))
        return self.function(*z), Derivatives(self, z)

    def tangent(self, saved: Derivatives, dz: Parts) -> Tensor | None:
        out = None
        for i, slope in saved.first.items():
            if dz[i] is not None:
                out = plus(out, slope * aligned(dz[i], len(self.shape)))
        return out

    def adjoint(self, saved: Derivatives, lam: Tensor, wanted: tuple[int, ...]) -> Parts:
        moving = enumerate(zip(self.inner, wanted, strict=True))
        return tuple(sum_to(lam * saved.first[i], s) if want else None for i, (s, want) in moving)

    def second_order(self, saved: Derivatives, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        both = {(i, j): t for (i, j), t in saved.second.items() if wanted[i] and wanted[j]}
        bends = {pair: lam * t for pair, t in both.items()}
        return self._form(bends, len(wanted)) if bends else None

    def majorant(self, saved: Derivatives, lam: Tensor, wanted: tuple[int, ...]) -> Form | None:
        """Entry by entry the absolute value of the matrix lam f'' between the inputs."""
        moving = [i for i, want in enumerate(wanted) if want]
        if len(moving) == 1:
            pair = (moving[0], moving[0])
            bend = saved.second.get(pair)
            return None if bend is None else self._form({pair: (lam * bend).abs()}, len(wanted))
        none = torch.zeros_like(lam)
        rows = [[lam * saved.second.get((i, j), none) for j in moving] for i in moving]
        M = absolute(torch.stack([torch.stack(row, -1) for row in rows], -2))
        places = [(a, b) for a in range(len(moving)) for b in range(len(moving))]
        return self._form({(moving[a], moving[b]): M[..., a, b] for a, b in places}, len(wanted))

    def _form(self, bends: dict[tuple[int, int], Tensor], count: int) -> Form:
        def form(dz: Parts, dout: Tensor | None) -> Parts:
            parts = [None] * count
            for (i, j), bend in bends.items():
                if dz[j] is not None:
                    part = sum_to(bend * aligned(dz[j], len(self.shape)), self.inner[i])
                    parts[i] = plus(parts[i], part)
            return tuple(parts)

        return form
