"""What a walk of bounds knows of each value, and what it lets a node know of itself.

The walk goes once along the chain. For every value z it carries a `Known`: norms that hold for all
weights within `radius` of the network's, and, where the example's own value is used, that value
at the centre. Without values (the a-priori rung) the norms follow from those of the weights and
of the input alone. Source: Theorem 1 (thm:jet), Corollary (cor:ball).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from utils.calculus.jets import Jet
from utils.calculus.lemmas import Number, centred, hypot, least, spectral, with_ones
from utils.calculus.nodes.base import Maybe, Node, Shape

Numbers = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Known:
    """Norms of one value z of every example, (n,) or (1,) where the examples do not matter.

    shape    of one example's value; a row is what its last axis holds
    jet      ||dz/dw_g|| and ||d2z/dw_g dw_g'||
    moved    >= |z(w) - z(w0)| for all weights w of the ball
    full     >= |z|
    row      >= the longest row
    centred  >= |z - mean of its rows|
    spread   >= the largest distance of a row from some one vector
    value    z at the centre (n, *shape), None where it is not used
    group    number of the group of weights, of a parameter; None for all else
    name     of the parameter
    data     whether it depends on the input
    node, inputs  the `Node` that made it, for one that knows better than a product of norms
    notes    further numbers that the node leaves for those that read it
    """

    jet: Jet
    shape: tuple[int, ...] = ()
    moved: Number = math.inf
    full: Number = math.inf
    row: Number = math.inf
    centred: Number = math.inf
    spread: Number = math.inf
    value: Maybe = None
    group: int | None = None
    name: str = ""
    data: bool = True
    node: Any = None
    inputs: tuple[Known, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows z has."""
        return math.prod(self.shape[:-1])

    @property
    def matrix(self) -> Tensor:
        """The rows at the centre, (n, rows, d)."""
        width = self.shape[-1] if self.shape else 1
        return self.value.reshape(len(self.value), self.rows, width).to(self.jet.a)

    def copies(self, shape: Shape) -> float:
        """The root of how often every number stands in z broadcast to `shape`."""
        return math.sqrt(math.prod(shape) / max(1, math.prod(self.shape)))

    @property
    def unknown(self) -> Tensor:
        """inf (1,), where nothing is known."""
        return self.jet.a.new_full((1,), math.inf)

    def norm(self, ones: bool = False, centre: bool = False) -> Tensor:
        """>= the spectral norm of the matrix of rows, with `ones` of [X 1]; with `centre` of the
        rows minus their mean.
        """
        size = self.centred if centre else self.full
        size = hypot(size, math.sqrt(self.rows)) if ones else size
        return least(self.at_centre(ones, centre) + self.moved, size)

    def at_centre(self, ones: bool = False, centre: bool = False) -> Tensor:
        """`norm` with these `ones` at the weights of the centre alone; inf where the value is not
        used."""
        if self.value is None:
            return self.unknown
        key = f"norm {ones} {centre}"
        if key not in self.notes:
            X = centred(self.matrix) if centre else self.matrix
            self.notes[key] = spectral(with_ones(X) if ones else X)
        return self.notes[key]

    def largest(self) -> Tensor:
        """>= the largest entry."""
        return least(self.largest_at_centre() + self.moved, self.row)

    def largest_at_centre(self) -> Tensor:
        """The largest entry at the weights of the centre; inf where the value is not used."""
        if self.value is None:
            return self.unknown
        entries = self.value.reshape(len(self.value), -1)
        return entries.to(self.jet.a).abs().amax(1)

    @property
    def stand_in(self) -> Tensor:
        """The value, or zeros of its shape for one example."""
        return self.jet.a.new_zeros(1, *self.shape) if self.value is None else self.value

    def tightened(self, radius: float) -> Known:
        """The same with every number at most what the others imply on a ball of this `radius`."""
        rows = max(1, self.rows)
        full = least(self.full, math.sqrt(rows) * self.row)
        moved = least(self.moved, radius * self.jet.a.norm(dim=-1), 2 * full)
        row, middle, spread = self.row, self.centred, self.spread
        if self.value is not None:
            X = self.matrix
            away = centred(X).square().sum(-1)
            full = least(full, X.flatten(1).norm(dim=1) + moved)
            row = least(row, X.norm(dim=-1).amax(1) + moved)
            middle = least(middle, away.sum(1).sqrt() + moved)
            spread = least(spread, away.amax(1).sqrt() + moved)
        row = least(row, full)
        spread = least(spread, row)
        middle = least(middle, full, math.sqrt(rows) * spread)
        return replace(self, moved=moved, full=full, row=row, centred=middle, spread=spread)


Inputs = tuple[Known, ...]


class Situation:
    """One walk: for which weights and examples the norms are to hold, and the numbers it met.

    radius    of the ball of weights about the network's
    values    whether the examples' own values are used
    floor     an assumed lower bound of every normalisation's rho, or None
    ceilings  numbers by (name of a step's output, name of the number) that are known to hold for
              these examples: none larger is used
    numbers   of the walk so far, by the same names
    still     the jet of what does not depend on the weights
    """

    def __init__(
        self,
        still: Jet,
        radius: float = 0.0,
        values: bool = True,
        floor: float | None = None,
        ceilings: dict[tuple[str, str], float] | None = None,
    ):
        self.still = still
        self.radius = radius
        self.values = values
        self.floor = floor
        self.ceilings = ceilings or {}
        self.numbers: Numbers = {}
        self.step = ""

    def number(self, name: str, value: Number) -> Tensor:
        """Note the number `name` of the step at hand, `value` (n,); returns it, or the ceiling
        where that is smaller."""
        key = (self.step, name)
        self.numbers[key] = least(value, self.ceilings.get(key, math.inf))
        return self.numbers[key]

    def apply(self, node: Node, inputs: Inputs) -> Known:
        """What is known of node(inputs)."""
        data = any(known.data for known in inputs)
        moves = any(known.jet.moves for known in inputs)
        value, saved = node.forward(*(known.stand_in for known in inputs))
        shape = tuple(value.shape[1:])
        real = value.is_floating_point()
        if any(known.value is None for known in inputs) or (data and moves and not self.values):
            value = None
            saved = None
        known = node.norms(inputs, saved, self)
        if any(known is each for each in inputs):
            return known
        if not moves:
            known = replace(known, moved=0.0)
        if known.node is None:  # else the same map in another order
            known = replace(known, node=node, inputs=inputs)
        known = replace(known, shape=shape, value=value, data=data)
        return known.tightened(self.radius) if real else known
