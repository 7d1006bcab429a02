"""The rungs prior and activations: products of norms, one walk along the chain to the loss.

Source: Theorem 1 (thm:jet), Corollary (cor:ball), Proposition (prop:connected), Proposition
(prop:measured).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.bounds.subject import ROUNDING, Subject, group_of, subject
from utils.calculus.jets import Jet
from utils.calculus.nodes.known import Known, Situation
from utils.calculus.nodes.loss import LOSS_NODES
from utils.networks.losses import logits

# LayerNorm, softmax, attention rows, activations: what nodes do to a tangent, not how large they
# are
SLOPES = ("first", "second", "own", "mixed", "softmax1", "softmax2", "A", "columns", "act1", "act2")


@dataclass(frozen=True)
class Measured:
    """Numbers of the chain that hold for every example of a data set and all weights within
    `radius`: by (name of a step's output, name of the number).

    modules  (module, name of the number) -> name of the step's output, for the closed form
    """

    values: dict[tuple[str, str], float]
    radius: float
    modules: dict[tuple[str, str], str]

    def least(self, module: str, name: str, value: float) -> float:
        """The number `name` of a module's step, or `value` where that is smaller."""
        step = self.modules.get((module, name), "")
        return min(value, self.values.get((step, name), math.inf))


def still(of: Subject) -> Jet:
    """The jet of what does not depend on the weights."""
    return Jet.constant(len(of.groups), next(of.model.parameters()).detach())


def known_values(of: Subject, rows: Tensor, at: Situation) -> dict[str, Known]:
    """What is known of every value of the chain, by name, for the examples in `rows`.

    Notes the numbers of the nodes in `at.numbers`. Raises Unknown for a node without norms.
    """
    like = next(of.model.parameters()).detach()
    m = len(of.groups)
    known: dict[str, Known] = {}
    for name, t in of.model.named_parameters():
        group = of.groups.index(group_of(name))
        jet = Jet.parameter(group, m, like)
        value = t.detach()[None]
        known[name] = Known(
            jet, tuple(t.shape), at.radius, value=value, group=group, name=name, data=False
        )
    buffers = {name: t[None] for name, t in of.model.named_buffers()}
    for name, t in (buffers | of.chain.constants_like(like)).items():
        known[name] = Known(at.still, tuple(t.shape[1:]), 0.0, value=t, data=False)
    x = of.x[rows][:, None]
    known[of.chain.input] = Known(at.still, tuple(x.shape[1:]), 0.0, value=x)
    for name, value in known.items():
        if value.value.is_floating_point():
            known[name] = value.tightened(at.radius)
    for step in of.chain.steps:
        at.step = step.output
        known[step.output] = at.apply(step.node, tuple(known[name] for name in step.inputs))
    return known


def products_of_norms(
    of: Subject,
    rung: str,
    radius: float,
    floor: float | None = None,
    measured: Measured | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bounds (n, m, m) of the norms of the Hessians' blocks, and the numbers behind them:
    ||H_gg'|| <= r_hat B_gg' + S_hat a_g a_g'.

    of        the network and its examples
    rung      "prior" or "activations"
    radius    of the ball of weights
    floor     an assumed lower bound of every rho
    measured  numbers in place of larger ones

    Source: Theorem 1 (thm:jet).
    """
    blocks = []
    terms = []
    ceilings = None if measured is None else measured.values
    for rows in torch.arange(of.n).split(chunk(of)):
        at = Situation(still(of), radius, rung == "activations", floor, ceilings)
        f = known_values(of, rows, at)[of.chain.output]
        at.step = "loss"
        node = LOSS_NODES[of.loss](of.y[rows])
        saved = None if f.value is None else node.forward(f.value)[1]
        bound = node.norms((f,), saved, at).jet.B * ROUNDING
        blocks.append(of_kept(of, bound).expand(len(rows), -1, -1))
        jet = Jet(f.jet.a[:, of.kept], of_kept(of, f.jet.B))
        numbers = {"D": never_nan(jet.a).norm(dim=-1), "E": norm_of_nonnegative(never_nan(jet.B))}
        numbers |= {f"{step} {name}": value for (step, name), value in at.numbers.items()}
        numbers["r_hat"] = numbers.pop("loss r_hat")
        numbers["S_hat"] = numbers.pop("loss S_hat")
        terms.append({name: float64(t).expand(len(rows)) for name, t in numbers.items()})
    names = terms[0]
    return torch.cat(blocks), {name: torch.cat([part[name] for part in terms]) for name in names}


def of_kept(of: Subject, B: Tensor) -> Tensor:
    """The blocks of B (n, m, m) of the groups kept, on the CPU; inf where nothing is known."""
    return never_nan(B[:, of.kept][:, :, of.kept].cpu())


def chunk(of: Subject) -> int:
    """Examples of a subject at a time: keeps the tensors (examples, rows, d, d) near 100 MB."""
    return max(1, int(1.2e7 / (of.size + 3 * len(of.groups) ** 2)))


@torch.no_grad()
def measured_norms(
    model: nn.Module, x: Tensor, radius: float = 0.0, names: tuple[str, ...] | None = SLOPES
) -> Measured:
    """The largest numbers of the chain over the examples x (n, ...), for `measured` of
    `hessian_bounds`: one forward pass.

    model   any traceable module
    radius  of the ball of weights
    names   the numbers to keep, None for all but those of the loss

    With radius > 0 they hold on that ball of weights, by the radii of the activations rung. Source:
    Proposition (prop:measured), Corollary (cor:ball).

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> sorted(name for _, name in measured_norms(model, torch.ones(2, 4)).values)
    ['act1', 'act2']
    """
    weight = next(model.parameters())
    first = x[:1].to(weight) if x.is_floating_point() else x[:1].to(weight.device)
    y = torch.zeros(len(x), *logits(model, first).shape[1:-1], dtype=torch.long)
    of = subject(model, x, y, "cross_entropy")
    places = {step.output: step.place.split(" of ", 1) for step in of.chain.steps}
    values: dict[tuple[str, str], float] = {}
    modules = {}
    for rows in torch.arange(of.n).split(chunk(of)):
        at = Situation(still(of), radius)
        known_values(of, rows, at)
        for key, value in at.numbers.items():
            step, name = key
            if names is None or name in names:
                values[key] = max(values.get(key, 0.0), float(float64(value).max()))
                operator, module = places[step]
                if operator not in ("select", "slice"):
                    modules[module, name] = step
    return Measured(values, radius, modules)


# --- arithmetic -----------------------------------------------------------------------------------


def float64(value: Tensor | float) -> Tensor:
    """A value on the CPU, as float64."""
    return torch.as_tensor(value, dtype=torch.float64).cpu()


def never_nan(value: Tensor) -> Tensor:
    """A value with inf in place of NaN.

    >>> never_nan(torch.tensor([float("nan"), 1.0]))
    tensor([inf, 1.])
    """
    return torch.where(value.isnan(), torch.inf, value)


def norm_of_nonnegative(M: Tensor) -> Tensor:
    """||M|| of symmetric nonnegative matrices (n, m, m), rounded up; inf where an entry is.

    >>> norm_of_nonnegative(torch.tensor([[[0.0, 2.0], [2.0, 0.0]]]))
    tensor([2.])
    """
    scale = M.amax((-2, -1))
    usable = ((scale > 0) & scale.isfinite())[:, None, None]
    safe = torch.where(usable, M / scale[:, None, None], torch.zeros_like(M))
    top = torch.linalg.eigvalsh(safe)[..., -1] * scale * ROUNDING
    return torch.where(scale.isfinite(), never_nan(top), torch.inf)
