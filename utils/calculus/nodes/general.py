"""Whatever torch can differentiate: an operator that has no node of its own. Exact, slower, without
bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from utils.calculus.nodes.arrays import per_example
from utils.calculus.nodes.base import Form, Forward, Maybe, Node, Parts, Unknown, Wanted
from utils.calculus.nodes.known import Inputs, Known, Situation
from utils.calculus.nodes.shape import schur


class Operator(Node):
    """One example's function of tensors, by jvp and vjp of itself under vmap.

    An operator without forward mode: D phi [dz] and the form are gradients of <vjp(lam), dz>, in
    lam and in z.

    name  which operator of which module, for the sentence of a bound that does not apply
    """

    def __init__(self, function: Callable, name: str):
        self.function = function
        self.name = name

    def forward(self, *z: Tensor) -> Forward:
        return per_example(self.function, z), z

    def tangent(self, saved: tuple, dz: Parts) -> Maybe:
        def forward(f: Callable, here: tuple, along: tuple) -> Tensor:
            return jvp(f, here, along)[1]

        def reverse(f: Callable, here: tuple, along: tuple) -> Tensor:
            out, back = vjp(f, *here)
            return vjp(back, torch.zeros_like(out))[1](along)[0]

        moving = tuple(t is not None for t in dz)
        if not any(moving):
            return None
        return self._either(saved, moving, forward, reverse, tuple(t for t in dz if t is not None))

    def adjoint(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Parts:
        parts = self._each(saved, wanted, lambda f, here, lam: vjp(f, *here)[1](lam), lam)
        return self._placed(parts, wanted)

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form | None:
        def forward(f: Callable, here: tuple, lam: Tensor, along: tuple) -> tuple:
            return jvp(lambda *w: vjp(f, *w)[1](lam), here, along)[1]

        def reverse(f: Callable, here: tuple, lam: Tensor, along: tuple) -> tuple:
            return vjp(lambda *w: vjp(f, *w)[1](lam), *here)[1](along)  # the form is symmetric

        def form(dz: Parts, dout: Maybe) -> Parts:
            moving = [(t, d) for t, d, want in zip(saved, dz, wanted, strict=True) if want]
            lead = max((len(d) for _, d in moving if d is not None), default=0)
            if not lead:
                return (None,) * len(dz)
            along = tuple(t.new_zeros(lead, *t.shape[1:]) if d is None else d for t, d in moving)
            return self._placed(self._either(saved, wanted, forward, reverse, lam, along), wanted)

        return form

    def majorant(self, saved: tuple, lam: Tensor, wanted: Wanted) -> Form | None:
        raise self._unknown()

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        if any(x.jet.moves for x in inputs):
            raise self._unknown()
        return Known(at.still)

    def _unknown(self) -> Unknown:
        return Unknown(
            f"The {self.name} has no bound: measure with "
            "per_sample_hessian_norms(..., certify=True), which knows any network."
        )

    @staticmethod
    def _placed(parts: tuple, wanted: Wanted) -> Parts:
        given = iter(parts)
        return tuple(next(given) if want else None for want in wanted)

    def _each(self, z: tuple, moving: tuple, function: Callable, *rest: Any) -> Any:
        """function(f, the moving values, *rest) for each example, f the operator as a function of
        what moves."""
        who = [i for i, move in enumerate(moving) if move]

        def one(values: tuple, *rest: Any) -> Any:
            def f(*arguments: Tensor) -> Tensor:
                full = list(values)
                for i, t in zip(who, arguments, strict=True):
                    full[i] = t
                return self.function(*full)

            return function(f, tuple(values[i] for i in who), *rest)

        lead = max(len(t) for t in tree_leaves((z, rest)))
        rest = tree_map(lambda t: t.expand(lead, *t.shape[1:]), rest)
        axes = tuple(None if len(t) == 1 else 0 for t in z)
        values = tuple(t[0] if len(t) == 1 else t for t in z)
        return vmap(one, (axes, *[0] * len(rest)))(values, *rest)

    def _either(
        self, z: tuple, moving: tuple, forward: Callable, reverse: Callable, *rest: Any
    ) -> Any:
        try:
            return self._each(z, moving, forward, *rest)
        except NotImplementedError:  # no forward mode
            return self._each(z, moving, reverse, *rest)


class LinearOperator(Operator):
    """An operator that is linear in its one input that can move: selections by constant indices,
    rolls, pads."""

    def second_order(self, saved: tuple, lam: Tensor, wanted: Wanted) -> None:
        return None

    def majorant(self, saved: tuple, lam: Tensor, wanted: Wanted) -> None:
        return None

    def norms(self, inputs: Inputs, saved: Any, at: Situation) -> Known:
        """An affine map of its one real input; none of those in the table has a negative entry."""
        place = next(i for i, x in enumerate(inputs) if x.stand_in.is_floating_point())
        values = [x.stand_in[:1] for x in inputs]
        others = inputs[:place] + inputs[place + 1 :]
        if any(x.value is not None and len(x.value) > 1 for x in others):
            raise self._unknown()  # indices that depend on the example

        def shifted(t: Tensor) -> Tensor:
            return self.forward(*values[:place], t, *values[place + 1 :])[0]

        x = inputs[place]
        constant = shifted(torch.zeros_like(values[place]))
        wanted = tuple(int(i == place) for i in range(len(values)))
        norm = schur(
            lambda t: shifted(t) - constant,
            lambda lam: self.adjoint(tuple(values), lam, wanted)[place],
            x,
        )
        full = norm * x.full + float(constant.norm())
        return Known(x.jet.linear(norm), moved=norm * x.moved, full=full)
