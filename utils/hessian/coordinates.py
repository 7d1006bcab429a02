"""Which parameters move, and their values as one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor

Named = dict[str, Tensor]
Operator = Callable[[Tensor], Tensor]  # v (P,) -> A v


def select_parameters(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """The names that `patterns` mean, in the order of `names`.

    names     all parameters, as `named_parameters` gives them
    patterns  names or patterns (`*`, `?`, `[ab]`); one that is itself a name stands for that
              parameter alone, whatever characters it holds; None stands for all

    Raises ValueError where nothing is meant.

    >>> select_parameters(["body.weight", "head.weight", "head.bias"], ["head.*"])
    ['head.weight', 'head.bias']
    >>> select_parameters(["[ab]", "a"], ["[ab]"])
    ['[ab]']
    """
    names = list(names)
    if patterns is None:
        return names
    patterns = list(patterns)
    literal = set(names).intersection(patterns)
    wild = [p for p in patterns if p not in literal]
    chosen = [n for n in names if n in literal or any(fnmatchcase(n, p) for p in wild)]
    if not chosen:
        raise ValueError(f"No parameter matches {patterns}: the names are {', '.join(names)}.")
    return chosen


class Coordinates:
    """Named parameters of which some move: those are the coordinates of flat vectors (P,).

    point  what moves, by name; rest what stands still; P the numbers in `point`

    >>> c = Coordinates()
    >>> c.move({"a": torch.zeros(2, 3), "b": torch.ones(1)}, ["a"])
    >>> c.P, c.unflatten(torch.ones(5, 6))["a"].shape
    (6, torch.Size([5, 2, 3]))
    """

    point: Named
    rest: Named
    P: int

    def move(self, named: Named, parameters: list[str] | None) -> None:
        """Let the tensors of `named` move that `parameters` mean (`select_parameters`)."""
        chosen = set(select_parameters(named, parameters))
        self.point = {n: t.detach() for n, t in named.items() if n in chosen}
        self.rest = {n: t.detach() for n, t in named.items() if n not in chosen}
        self.P = sum(t.numel() for t in self.point.values())

    @property
    def w(self) -> Tensor:
        """The weights as one vector (P,)."""
        return torch.cat([t.reshape(-1) for t in self.point.values()])

    def unflatten(self, v: Tensor) -> Named:
        """v (..., P) -> tensors by name, leading axes kept."""
        parts = v.split([t.numel() for t in self.point.values()], dim=-1)
        pairs = zip(parts, self.point.items(), strict=True)
        return {n: part.reshape((*v.shape[:-1], *t.shape)) for part, (n, t) in pairs}

    def flatten(
        self,
        tensors: dict[str, Tensor | None],
        leading: tuple[int, ...] = (),
        out: Tensor | None = None,
    ) -> Tensor:
        """The inverse of `unflatten`: tensors by name as (*leading, P), into `out` if given; None
        stands for 0."""
        if out is None:
            out = next(iter(self.point.values())).new_empty(*leading, self.P)
        parts = out.split([t.numel() for t in self.point.values()], dim=-1)
        for part, name in zip(parts, self.point, strict=True):
            t = tensors[name]
            if t is None:
                part.zero_()
            else:
                part.copy_(t.reshape(*leading, -1))
        return out
