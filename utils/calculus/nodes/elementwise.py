"""Functions entry by entry: activations, and any other, whose derivatives automatic differentiation
gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad

from utils.calculus.jets import Jet
from utils.calculus.lemmas import least
from utils.calculus.nodes.arrays import absolute, aligned, plus, sum_to
from utils.calculus.nodes.base import (
    Form,
    Forward,
    Leaves,
    Maybe,
    Node,
    Parts,
    Roots,
    Shape,
    Shapes,
    Unknown,
    Wanted,
)
from utils.calculus.nodes.known import Inputs, Known, Situation


def gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """GELU'(z), GELU''(z) of any shape. Source: Lemma 4 (lem:activations)."""
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density, density * (2 - z.square())


def gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    """The first two derivatives at z of GELU's approximation by tanh.

    Source: Lemma 4 (lem:activations).
    """
    c = math.sqrt(2 / math.pi)
    a = 0.044715
    t = torch.tanh(c * (z + a * z**3))
    sech2 = 1 - t.square()
    slope = c * (1 + 3 * a * z.square())
    bend = 6 * c * a * z
    first = (1 + t) / 2 + z * sech2 * slope / 2
    return first, sech2 * slope + z * sech2 * (bend / 2 - t * slope.square())


def relu(z: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU'(z), ReLU''(z): slope 0 at the kink, as in torch; the second is 0 almost everywhere."""
    return (z > 0).to(z.dtype), torch.zeros_like(z)


@dataclass(frozen=True)
class Slopes:
    """What holds of a function everywhere; decimal constants are rounded up.

    low, high  of the first derivative; `second`, `third` >= the absolute values of the next two
    shrinks    whether |f(z)| <= |z|
    largest    >= |f|
    """

    low: float = -math.inf
    high: float = math.inf
    second: float = math.inf
    third: float = math.inf
    shrinks: bool = True
    largest: float = math.inf

    @property
    def first(self) -> float:
        """>= the absolute value of the first derivative."""
        return max(abs(self.low), abs(self.high))


# Source: Lemma 4 (lem:activations) for GELU and its approximation; ReLU almost everywhere
SLOPES = {
    "gelu": Slopes(-0.12891, 1.12891, 0.79789, 0.77877),
    "gelu_tanh": Slopes(-0.1290, 1.1290, 0.79789, 0.77670),
    "relu": Slopes(0.0, 1.0, 0.0),
    "tanh": Slopes(0.0, 1.0, 0.76981, 2.0, largest=1.0),
    "sigmoid": Slopes(0.0, 0.25, 0.09623, 0.125, shrinks=False, largest=1.0),
    "silu": Slopes(-0.09985, 1.09985, 0.5, 0.30819),
    "sin": Slopes(-1.0, 1.0, 1.0, 1.0, largest=1.0),
    "cos": Slopes(-1.0, 1.0, 1.0, 1.0, shrinks=False, largest=1.0),
}


class Derivatives:
    """The first and second derivatives of an elementwise function at z, computed when they are
    first asked for.

    `first` has the derivative in each moving input, `second` the nonzero ones in each pair of them.
    """

    def __init__(self, node: Elementwise, z: tuple[Tensor, ...]):
        self.node = node
        self.z = z

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor] | None:
        return self.node.derivatives(self.z[0]) if self.node.derivatives else None

    @cached_property
    def first(self) -> dict[int, Tensor]:
        """By moving input."""
        if self._known is not None:
            return {0: self._known[0]}
        return {i: self._slope(i)(*self.z) for i in self._real}

    @cached_property
    def second(self) -> dict[tuple[int, int], Tensor]:
        """By pair of moving inputs; none that is zero."""
        if self._known is not None:
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

    derivatives  z -> (f'(z), f''(z)) where there is one input and they are known; otherwise they
                 come from automatic differentiation of the function itself, once for a batch
    slopes       what holds everywhere, for bounds away from a point
    name         which operator of which module
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        shape: Shape,
        inner: Shapes,
        derivatives: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        slopes: Slopes | None = None,
        name: str = "elementwise function",
    ):
        self.function = function
        self.shape = tuple(shape)
        self.inner = [tuple(s) for s in inner]
        self.derivatives = derivatives
        self.slopes = slopes
        self.name = name

    def forward(self, *z: Tensor) -> Forward:
        if len(z) > 1:
            z = tuple(torch.broadcast_tensors(*(aligned(t, len(self.shape)) for t in z)))
        return self.function(*z), Derivatives(self, z)

    def tangent(self, saved: Derivatives, dz: Parts) -> Maybe:
        out = None
        for i, slope in saved.first.items():
            if dz[i] is not None:
                out = plus(out, slope * aligned(dz[i], len(self.shape)))
        return out

    def adjoint(self, saved: Derivatives, lam: Tensor, wanted: Wanted) -> Parts:
        moving = enumerate(zip(self.inner, wanted, strict=True))
        return tuple(sum_to(lam * saved.first[i], s) if want else None for i, (s, want) in moving)

    def second_order(self, saved: Derivatives, lam: Tensor, wanted: Wanted) -> Form | None:
        both = {(i, j): t for (i, j), t in saved.second.items() if wanted[i] and wanted[j]}
        bends = {pair: lam * t for pair, t in both.items()}
        return self._form(bends, len(wanted)) if bends else None

    def majorant(self, saved: Derivatives, lam: Tensor, wanted: Wanted) -> Form | None:
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
        def form(dz: Parts, dout: Maybe) -> Parts:
            parts = [None] * count
            for (i, j), bend in bends.items():
                if dz[j] is not None:
                    part = sum_to(bend * aligned(dz[j], len(self.shape)), self.inner[i])
                    parts[i] = plus(parts[i], part)
            return tuple(parts)

        return form

    def roots(
        self,
        saved: Derivatives,
        lam: Tensor,
        wanted: Wanted,
        shapes: Shapes,
        leaves: Leaves,
    ) -> Roots:
        """Of one input the root of the absolute form, entry by entry."""
        if len(wanted) > 1:
            return super().roots(saved, lam, wanted, shapes, leaves)
        if (0, 0) not in saved.second:
            return ()
        half = (lam * saved.second[0, 0])[0].abs().sqrt()
        return ((torch.diag(half.flatten()).reshape(-1, *half.shape),),)

    def norms(self, inputs: Inputs, saved: Derivatives | None, at: Situation) -> Known:
        moving = [i for i, x in enumerate(inputs) if x.jet.moves]
        if not moving:
            return Known(at.still)
        if len(inputs) == 1:
            return self._of_one(inputs[0], saved, at)
        if saved is None or at.radius > 0:
            raise self._unknown()
        shape = torch.broadcast_shapes(*(x.shape for x in inputs))
        copies = [x.copies(shape) for x in inputs]
        first = [0.0] * len(inputs)
        for i in moving:
            first[i] = copies[i] * _top(saved.first[i])
        second = {
            (i, j): min(copies[i], copies[j]) * _top(bend)
            for (i, j), bend in saved.second.items()
            if i in moving and j in moving and i <= j
        }
        return Known(Jet.of([x.jet for x in inputs], first, second), moved=0.0)

    def _of_one(self, x: Known, saved: Derivatives | None, at: Situation) -> Known:
        """Slopes at the centre grow with the displacement, up to those that hold everywhere."""
        if self.slopes is None and (saved is None or at.radius > 0):
            raise self._unknown()
        limits = self.slopes or Slopes(shrinks=False)
        if at.radius > 0 and limits.second == 0 < limits.high - limits.low:
            raise Unknown(
                "The Hessian of a ReLU network says nothing about a ball: "
                f"take another function than the {self.name}, or radius 0."
            )
        first = second = math.inf
        if saved is not None:
            first, second = self._at_centre(x.value, saved, limits)
            if at.radius > 0:
                first = first + limits.second * x.moved
                second = second + limits.third * x.moved
        first = at.number("act1", least(first, limits.first))
        second = at.number("act2", least(second, limits.second))
        return Known(
            x.jet.smooth(first, second),
            moved=first * x.moved,
            notes={"slopes": limits, "act1": first, "act2": second},
            **self._sizes(x, limits),
        )

    @staticmethod
    def _at_centre(z: Tensor, saved: Derivatives, limits: Slopes) -> tuple[Tensor, Tensor]:
        """The largest slope and bend of every example."""
        slope = saved.first[0]
        if limits.second == 0:  # at a kink the larger slope
            slope = torch.where(z == 0, limits.first, slope)
        bend = saved.second.get((0, 0))
        return _top(slope), _top(slope) * 0 if bend is None else _top(bend)

    def _sizes(self, x: Known, limits: Slopes) -> dict[str, Tensor]:
        """Sizes of f(z): at most those of z where f shrinks, otherwise |f(0)| and the slope
        more."""
        zero = float(self.function(x.jet.a.new_zeros(())).abs())
        factor = 1.0 if limits.shrinks else limits.first
        entries = math.sqrt(math.prod(x.shape))
        width = math.sqrt(x.shape[-1]) if x.shape else 1.0
        return {
            "full": least(factor * x.full + zero * entries, limits.largest * entries),
            "row": least(factor * x.row + zero * width, limits.largest * width),
        }

    def _unknown(self) -> Unknown:
        return Unknown(
            f"Nothing is known of the slopes of the {self.name} away from a point: "
            "use radius 0 and the rung 'activations' or a sharper one."
        )


def _top(t: Tensor) -> Tensor:
    """The largest entry of every example."""
    return t.reshape(len(t), -1).abs().amax(1)
