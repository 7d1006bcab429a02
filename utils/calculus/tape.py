"""One pass of a batch over a chain, with everything that products share: values, adjoints,
second-order forms.

Values and adjoints do not depend on the direction of a product: `Tape` computes them once, and each
product costs one walk forward and one back, about two gradients. Source: Theorem (thm:adjoint),
whose bilinear form u^T h v this is the gradient of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.calculus.chain import Chain
from utils.calculus.lowering import Step
from utils.calculus.nodes.arrays import plus, scaled_by
from utils.calculus.nodes.base import Form, Wanted
from utils.calculus.nodes.loss import LOSS_NODES

Named = dict[str, Tensor]
Parts = dict[str, Tensor | None]  # None is zero
Forms = dict[str, Form]  # but for those that are 0
STEP = 8.0  # most that one balancing changes a weight of a coupling
LARGEST = 690.0  # of the logarithm of a weight's square where it is found at once: that is finite


class Tape:
    """Values, gradients and Hessian products of the losses of a batch.

    chain    of the network, from `read_chain`
    point    its parameters and buffers by name
    x, y     inputs (n, ...), labels (n,) or (n, T), or targets of the output's shape for "mse"
    loss     "cross_entropy", "mse" or "bce"
    moving   names of the parameters that have tangents and gradients; all of them by default
    sums     False: each example has its own direction (n, ...) and its own product; True: one
             direction (...) for all, and products and gradients are summed over the examples
    weights  of the examples' losses (n,) in gradients and products; ones by default

    After construction: losses (n,); values, saved, wanted by name of a step's output, for the
    bounds' walks.

    >>> from utils.calculus.chain import read_chain
    >>> model, x = torch.nn.Linear(2, 3, bias=False), torch.tensor([[3.0, 4.0]])
    >>> point = {"weight": torch.zeros(3, 2)}  # the Hessian is (diag p - p p^T) x x^T, p = 1/3
    >>> tape = Tape(read_chain(model, x), point, x, torch.tensor([0]))
    >>> tape.product({"weight": torch.eye(3)[:1, :, None] * x})["weight"][0, 0]
    tensor([16.6667, 22.2222])
    """

    def __init__(
        self,
        chain: Chain,
        point: Named,
        x: Tensor,
        y: Tensor,
        loss: str = "cross_entropy",
        moving: Iterable[str] | None = None,
        sums: bool = False,
        weights: Tensor | None = None,
    ):
        self.chain = chain
        self.moving = tuple(point) if moving is None else tuple(moving)
        self.sums = sums
        self.weights = weights
        self.head = Step(LOSS_NODES[loss](y), (chain.output,), "loss", f"{loss} of the output")
        self.steps = [*chain.steps, self.head]
        self.values: Named = self._constants(point, x)
        self.saved: dict[str, object] = {}
        self.wanted: dict[str, Wanted] = {}
        self.sigma: Named = {}
        self.leaves = frozenset(self.moving)
        self._gradient: Parts | None = None
        self._forms: Forms | None = None
        self._majorants: Forms | None = None
        self._forward(self._like(point).dtype)
        self.losses = self.values["loss"]
        ones = torch.ones_like(self.losses) if weights is None else weights
        self.adjoints = self._adjoints(ones)

    @staticmethod
    def _like(point: Named) -> Tensor:
        """A weight, whose dtype and device all of the walk has; buffers may be of other types."""
        return next(t for t in point.values() if t.is_floating_point())

    def _constants(self, point: Named, x: Tensor) -> Named:
        like = self._like(point)
        values = {name: t[None] for name, t in point.items()}
        values |= self.chain.constants_like(like)
        values[self.chain.input] = x[:, None]
        return values

    def _forward(self, dtype: torch.dtype) -> None:
        alive = set(self.moving)
        for step in self.steps:
            value, saved = step.node.forward(*(self.values[name] for name in step.inputs))
            if value.is_floating_point() and value.dtype != dtype:
                value = value.to(dtype)
            self.values[step.output] = value
            moves = [name in alive for name in step.inputs]
            smooth = value.is_floating_point() or value.is_complex()
            if any(moves) and smooth:
                alive.add(step.output)
                self.saved[step.output] = saved
                self.wanted[step.output] = tuple(
                    self._want(n) if m else 0 for n, m in zip(step.inputs, moves)
                )
        self.active = [step for step in self.steps if step.output in self.wanted]

    def _want(self, name: str) -> int:
        return 2 if self.sums and self.values[name].shape[0] == 1 else 1

    def _adjoints(self, start: Tensor) -> Named:
        """dl/dz of every value that depends on moving weights; of the weights only in
        `gradient`."""
        found = {"loss": start}
        for step in reversed(self.active):
            lam = found.get(step.output)
            wanted = self._parts(step, leaves=False)
            if lam is not None and any(wanted):
                self._pull(found, step, lam, wanted)
        return found

    def _parts(self, step: Step, leaves: bool) -> Wanted:
        """The wanted inputs of a step that are moving weights themselves, or those that are not."""
        pairs = zip(step.inputs, self.wanted[step.output], strict=True)
        return tuple(want if (name in self.leaves) == leaves else 0 for name, want in pairs)

    def _back(self, found: Named, forms: Forms, tangents: Named) -> Named:
        """The walk back from the adjoints in `found`, but for the loss; adds the forms of the
        tangents."""
        for step in reversed(self.active[:-1]):
            wanted = self.wanted[step.output]
            mu = found.get(step.output)
            form = forms.get(step.output)
            if form is not None:
                dz = tuple(tangents.get(name) for name in step.inputs)
                after = getattr(form, "after", None)  # the form and the adjoint in one pass
                both = after(mu, dz) if after is not None and mu is not None else None
                if both is not None:
                    self._collect(found, step, both, wanted)
                    continue
                self._collect(found, step, form(dz, tangents.get(step.output)), wanted)
            if mu is not None:
                self._pull(found, step, mu, wanted)
        return found

    def _pull(self, found: Named, step: Step, lam: Tensor, wanted: Wanted) -> None:
        """Add D phi^T lam of a step to what was found of its inputs."""
        parts = step.node.adjoint(self.saved[step.output], lam, wanted)
        self._collect(found, step, parts, wanted)

    @staticmethod
    def _collect(found: Named, step: Step, parts: tuple, wanted: Wanted) -> None:
        for name, part, want in zip(step.inputs, parts, wanted, strict=True):
            if want and part is not None:
                if want == 2 and part.shape[0] > 1:
                    part = part.sum(0, keepdim=True)
                found[name] = plus(found.get(name), part)

    def gradient(self) -> Parts:
        """Gradients by parameter, (n, ...) or summed (...); None where a parameter has no
        influence."""
        if self._gradient is None:
            found: Named = {}
            for step in self.active:
                lam = self.adjoints.get(step.output)
                wanted = self._parts(step, leaves=True)
                if lam is not None and any(wanted):
                    self._pull(found, step, lam, wanted)
            self._gradient = self._by_parameter(found)
        return self._gradient

    def _by_parameter(self, found: Named) -> Parts:
        parts = {name: found.get(name) for name in self.moving}
        if self.sums:
            return {name: None if part is None else part[0] for name, part in parts.items()}
        return parts

    def tangents(self, direction: Named) -> Named:
        """z' of every value by name, along a direction: tangents (n, ...), or one (...) for all, of
        the moving parameters."""
        found = {name: t[None] if self.sums else t for name, t in direction.items()}
        for step in self.active[:-1]:
            dz = tuple(found.get(name) for name in step.inputs)
            if any(t is not None for t in dz):
                moved = step.node.tangent(self.saved[step.output], dz)
                if moved is not None:
                    found[step.output] = moved
        return found

    def product(self, direction: Named, part: str = "full", out: Named | None = None) -> Parts:
        """Hessian times direction by parameter, shapes as in `gradient`; None where it is zero.

        direction  tangents by name, as in `tangents`
        part       "full", "gauss_newton" (J^T S J, S the Hessian of the loss in the output),
                   "functional" (the rest), or "majorant": J^T S J plus the majorants of all nodes,
                   a matrix Q with -Q <= H <= Q
        out        tensors by name, of the shapes of `gradient`, that take the result, zeros
                   included

        Source: Theorem (thm:adjoint), Theorem (thm:majorant).
        """
        tangents = self.tangents(direction)
        forms = self.majorants() if part == "majorant" else self.forms()
        start: Named = {}
        of_loss = forms.get("loss")
        if part != "functional" and of_loss is not None:
            top = of_loss((tangents.get(self.chain.output),), None)[0]
            if top is not None:
                start = {self.chain.output: top}
        inner = {} if part == "gauss_newton" else forms
        found = self._by_parameter(self._back(start, inner, tangents))
        if out is None:
            return found
        for name, target in out.items():
            if found.get(name) is None:
                target.zero_()
            else:
                target.copy_(found[name])
        return {name: out.get(name, found[name]) for name in self.moving}

    def forms(self) -> Forms:
        """The second-order forms < lam, D^2 phi > of all steps that move, by name of their
        output."""
        if self._forms is None:
            self._forms = self._of_steps(lambda step: step.node.second_order)
        return self._forms

    def majorants(self) -> Forms:
        """The majorants of all steps that move, those of couplings weighed by sigma. Raises
        `Unknown`."""
        if self._majorants is None:
            self._majorants = self._of_steps(lambda step: step.node.majorant)
            for step in self.active:
                if step.node.couples and step.output in self._majorants:
                    form = self._majorants[step.output]
                    self._majorants[step.output] = self._weighed(form, step.output)
        return self._majorants

    def _of_steps(self, method: Callable[[Step], Callable[..., Form | None]]) -> Forms:
        """The forms that a method of each node makes, but for those that are 0."""
        found: Forms = {}
        for step in self.active:
            lam = self.adjoints.get(step.output)
            if lam is not None:
                form = method(step)(self.saved[step.output], lam, self.wanted[step.output])
                if form is not None:
                    found[step.output] = form
        return found

    def _weighed(self, form: Form, name: str) -> Form:
        """The majorant of a coupling with its sigma, whatever that is when it is asked."""

        def weighed(dz: tuple, dout: Tensor | None) -> tuple:
            first, second, *rest = form(dz, dout)
            sigma = self.sigma.get(name)
            if sigma is not None and first is not None:
                first = scaled_by(sigma, first)
                second = scaled_by(1 / sigma, second)
            return (first, second, *rest)

        return weighed

    def balance(self, direction: Named, whole: bool = False) -> None:
        """Bring every coupling's sigma (n,) halfway to where its majorant is smallest along
        `direction` (n, ...), by a factor of at most STEP; all the way if `whole`.

        2 <x, C y> <= sigma <x, |C^T| x> + <y, |C| y> / sigma holds for every sigma > 0; at x, y it
        is smallest at sigma^2 = <y, |C| y> / <x, |C^T| x>. The norm of Q is convex in the
        logarithms of the sigmas, and at its top eigenvector this is a step of descent; the whole
        step would swing between nearly equal eigenvalues. Where neither side moves along the
        direction sigma stays. Source: Theorem (thm:majorant).
        """
        tangents = self.tangents(direction)
        majorants = self.majorants()
        for step in self.active[:-1]:
            form = majorants.get(step.output)
            if form is None or not step.node.couples:
                continue
            dz = tuple(tangents.get(name) for name in step.inputs)
            if dz[0] is None or dz[1] is None:
                continue
            # log of sigma^2 <x, |C^T| x> / <y, |C| y> of the sigma so far
            x, y = (log_dot(t, part) for t, part in list(zip(dz, form(dz, None)))[:2])
            if whole:
                change = (y - x).nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST, LARGEST) / 2
            else:
                most = math.log(STEP)
                change = ((y - x).nan_to_num(nan=0.0) / 4).clamp(-most, most)
            change = change.exp()
            self.sigma[step.output] = change * self.sigma.get(step.output, torch.ones_like(change))


def log_dot(a: Tensor, b: Tensor) -> Tensor:
    """log <a, b> (n,) of arrays a, b (n, ...), -inf where it is not positive; the products do not
    underflow."""
    a = a.reshape(len(a), -1)
    b = b.reshape(len(b), -1)
    sizes = [t.abs().amax(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny) for t in (a, b)]
    dot = (a / sizes[0] * (b / sizes[1])).sum(1).clamp_min(0)
    return dot.log() + sizes[0][:, 0].log() + sizes[1][:, 0].log()
