"""Losses, gradients and Hessian products of any module by automatic differentiation.

A point is a dictionary of parameters by name. Three engines are tried, in this order:

"jvp(grad)"           forward over reverse, examples side by side under vmap
"double backward"     reverse over reverse under vmap, where an operator has no forward mode
"loop over examples"  double backward, one example after the other, where vmap has no rule

An engine is taken if two random products u.(H v) and v.(H u) agree, as they must: forward and
reverse mode of an operator may contradict each other (`Embedding(padding_idx)` does).
Forward over `jacrev` is none of them: through `F.layer_norm` it is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from utils.networks.copies import second_order_mode
from utils.networks.losses import logits, loss_from_logits
from utils.run.streams import generator

ENGINES = ("jvp(grad)", "double backward", "loop over examples")
PARTS = ("full", "gauss_newton", "functional")

Point = dict[str, Tensor]


def refuse_not_finite(products: Tensor) -> None:
    """Raise ValueError unless `products`, or numbers made of them, are finite."""
    if not products.isfinite().all():
        raise ValueError(
            "A product with the Hessian is no finite number: look at the inputs and at operations "
            "without a second derivative."
        )


def check_part(part: str) -> None:
    """Raise ValueError unless `part` is "full", "gauss_newton" or "functional"."""
    if part not in PARTS:
        raise ValueError(f"part is {part!r}: choose one of {', '.join(PARTS)}.")


class Logits(nn.Module):
    """The module with its output reduced to the logits, so that `functional_call` sees a tensor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.net, x)


class Differentiation:
    """The derivatives of one module's losses; `engine` is set by `choose`, "" before.

    point is the parameters by name, x (n, ...) inputs, y (n,) labels, part "full", "gauss_newton"
    or "functional", in every method.
    """

    def __init__(self, model: nn.Module, loss: str):
        self.net = Logits(model)
        self.loss = loss
        self.dtype = next(model.parameters()).dtype
        self.engine = ""

    def logits(self, point: Point, x: Tensor) -> Tensor:
        """The module's output (n, K) for x, the parameters in `point` in their place."""
        x = x.clone()  # a module may work on its input in place
        return functional_call(self.net, {f"net.{n}": t for n, t in point.items()}, (x,))

    def losses(self, point: Point, x: Tensor, y: Tensor) -> Tensor:
        """Losses (n,) at `point` of x and y."""
        f = self.logits(point, x)
        if f.dtype != self.dtype and f.is_floating_point():
            f = f.to(self.dtype)  # a network that names a type for its output
        return loss_from_logits(f, y, self.loss)

    def gradient(self, point: Point, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Point]:
        """The sum of the losses of x and y at `point` times `weights` (n,), and its gradient by
        name."""
        with torch.enable_grad(), second_order_mode():
            leaves = {n: t.clone().requires_grad_(True) for n, t in point.items()}
            value = self.losses(leaves, x, y) @ weights
            parts = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return value.detach(), dict(zip(leaves, parts, strict=True))

    def example_gradients(self, point: Point, x: Tensor, y: Tensor) -> Point:
        """The gradient at `point` of every example of x and y, by name, examples first."""

        def one(a: Tensor, b: Tensor) -> Point:
            return grad(lambda q: self.losses(q, a[None], b[None])[0])(point)

        return self._each(one, x, y)

    def product(
        self, point: Point, direction: Point, x: Tensor, y: Tensor, part: str, weights: Tensor
    ) -> Point:
        """H v by name at `point`: H, or a `part` of it, of the sum of the losses of x and y times
        `weights` (n,), v `direction`."""
        with second_order_mode():
            return self._product(point, direction, x, y, part, weights)

    def example_products(
        self, point: Point, directions: Point, x: Tensor, y: Tensor, part: str
    ) -> Point:
        """h_i v_i by name, examples of x and y first, as the directions have it; point and part as
        in `product`."""
        one_weight = next(iter(point.values())).new_ones(1)

        def one(direction: Point, a: Tensor, b: Tensor) -> Point:
            return self._product(point, direction, a[None], b[None], part, one_weight)

        return self._each(one, directions, x, y)

    def choose(self, point: Point, x: Tensor, y: Tensor) -> str:
        """Set `engine` to the first that works at `point` on x and y, and return it.

        Products that are no finite numbers say nothing against an engine: whoever uses them
        refuses them. Raises ValueError where no engine works.
        """
        stream = generator("engine", 0)
        pair = []
        for _ in range(2):
            noise = {n: torch.randn(t.shape, generator=stream) for n, t in point.items()}
            pair.append({n: v.to(point[n]).expand(len(x), *v.shape) for n, v in noise.items()})
        reason = "two products with it contradict each other"
        for self.engine in ENGINES:
            try:
                images = [self.example_products(point, v, x, y, "full") for v in pair]
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
                continue
            if _symmetric(pair, *images):
                return self.engine
        self.engine = ""
        raise ValueError(f"The model has no Hessian to be had ({reason}): replace that operation.")

    def _each(self, one: Callable, *inputs: Any) -> Point:
        """`one` of each example of the inputs, stacked."""
        with second_order_mode():
            if self.engine != "loop over examples":
                return vmap(one)(*inputs)
            first = inputs[0]
            count = len(next(iter(first.values())) if isinstance(first, dict) else first)
            found = [one(*(_example(t, i) for t in inputs)) for i in range(count)]
        return {name: torch.stack([f[name] for f in found]) for name in found[0]}

    def _product(
        self, point: Point, direction: Point, x: Tensor, y: Tensor, part: str, weights: Tensor
    ) -> Point:
        def value(q: Point) -> Tensor:
            return self.losses(q, x, y) @ weights

        def of_logits(f: Tensor) -> Tensor:
            return loss_from_logits(f, y, self.loss) @ weights

        full = {}
        if part != "gauss_newton":
            full = self._second_derivative(value, point, direction)
            if part == "full":
                return full
        f, moved = self._tangent(lambda q: self.logits(q, x), point, direction)
        curved = jvp(grad(of_logits), (f,), (moved,))[1]
        outer = vjp(lambda q: self.logits(q, x), point)[1](curved)[0]
        return outer if part == "gauss_newton" else {n: full[n] - outer[n] for n in point}

    def _second_derivative(self, value: Callable, point: Point, direction: Point) -> Point:
        if self.engine == "jvp(grad)":
            return jvp(grad(value), (point,), (direction,))[1]
        return grad(lambda q: _inner(grad(value)(q), direction))(point)

    def _tangent(self, function: Callable, point: Point, direction: Point) -> tuple[Tensor, Tensor]:
        """The function's value and its derivative along `direction`."""
        if self.engine == "jvp(grad)":
            return jvp(function, (point,), (direction,))
        value, pull = vjp(function, point)
        transposed = vjp(lambda u: pull(u)[0], torch.zeros_like(value))[1]
        return value, transposed(direction)[0]


def _inner(a: Point, b: Point) -> Tensor:
    return sum((a[n] * b[n]).sum() for n in a)


def _example(inputs: Tensor | Point, i: int) -> Any:
    if isinstance(inputs, dict):
        return {n: t[i] for n, t in inputs.items()}
    return inputs[i]


def _symmetric(pair: list[Point], first: Point, second: Point) -> bool:
    """Whether u.(H v) = v.(H u) to the square root of rounding, where that can be said.

    first is H u, second H v.
    """
    u, v = pair
    largest = max(t.abs().max() for image in (first, second) for t in image.values())
    if largest == 0 or not largest.isfinite():
        return True
    first, second = ({n: t / largest for n, t in image.items()} for image in (first, second))
    difference = _inner(u, second) - _inner(v, first)
    size = sum(_inner(a, a).sqrt() * _inner(b, b).sqrt() for a, b in ((u, second), (v, first)))
    return bool(difference.abs() <= torch.finfo(difference.dtype).eps ** 0.5 * size)
