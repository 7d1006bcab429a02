"""Losses, gradients and Hessians of the classifier: products, norms with residuals, certificates, traces, spectra.

Every function works on a copy of the model (eval mode, float64 unless said otherwise, attention by
its mathematical kernel) and leaves the model handed in as it was. Flat vectors of length P follow
`named_parameters`, frozen ones included: the surface is a function of all weights; `parameters` restricts
them by name patterns (`["head.*"]`). Second derivatives of the networks of `utils.models` are walks of
`utils.calculus`; any other module gets the same through `jvp(grad)`, forward over reverse, which is right on
every module, `F.layer_norm` included.

L_k is the mean loss of k samples, H_k its Hessian, h_i the Hessian of sample i alone. A Hessian splits into the
Gauss-Newton part J^T S J, with J the Jacobian of the logits and S the loss's Hessian in them, and the functional
part, the rest; `part` chooses "full", "gauss_newton" or "functional".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from utils import calculus, pyhessian_adapter
from utils.models import (
    LOSSES,
    logits,
    loss_from_logits,
    prepared_copy,
    refuse_random_or_batch_dependent,
    second_order_mode,
)

PARTS = ("full", "gauss_newton", "functional")
MEMORY = 2**31  # default budget of an estimator's working arrays [bytes]
TAPE, KEPT = 6, 3  # arrays for each activation of a forward pass: during a walk of the calculus, and between walks
LEAST = 8  # Lanczos steps before an estimate may be taken for settled
UNORTHOGONAL = 20  # Lanczos steps that need no reorthogonalisation at a tolerance of 1e-4


@dataclass(frozen=True)
class NormEstimate:
    """A spectral norm (floats) or n of them (float64 tensors of length n).

    value      the estimate
    lower      rigorous: the norm is at least this (Rayleigh quotients lie inside the spectrum)
    upper      the norm is at most this with the stated probability (Theorem (thm:lanczos)); nan if not asked for
    residual   |H v - theta v| of the unit vector v behind the value: some eigenvalue lies that near
    iterations Hessian-vector products spent
    converged  residual within the tolerance asked for (certified: the interval within it)
    """

    value: Tensor | float
    lower: Tensor | float
    upper: Tensor | float
    residual: Tensor | float
    iterations: Tensor | int
    converged: Tensor | bool


class Losses:
    """The losses of a batch as functions of a flat weight vector: what every operator below is built from.

    x (n, ...) and y (n,) are the samples, `parameters` the name patterns of the coordinates that move. `memory`
    [bytes] is the budget from which chunk sizes follow; `chunk_size` [samples] overrides them.
    Raises ValueError for an unknown loss, for patterns that match nothing, for weights that are not finite and for
    models whose loss of a sample is random or depends on other samples.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: str = "cross_entropy",
        *,
        parameters: list[str] | None = None,
        dtype: torch.dtype = torch.float64,
        device=None,
        chunk_size: int | None = None,
        memory: int = MEMORY,
    ):
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x has {len(x)} samples and y has {len(y)}: give as many labels as inputs, at least one.")
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}: choose one of {', '.join(LOSSES)}.")
        if device is None:
            device = next(model.parameters()).device
        self.model = prepared_copy(model, dtype, device)
        self.x = x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype)
        self.y, self.loss, self.chunk_size, self.memory = y.to(device), loss, chunk_size, memory
        for n, p in self.model.named_parameters():
            if not p.isfinite().all():
                raise ValueError(f"The weights {n} hold NaN or infinity: train the model again or load other weights.")
            p.requires_grad_(False)  # every derivative below is of a point put in the place of the parameters
        refuse_random_or_batch_dependent(self.model, self.x)
        self.n = len(x)
        self.steps = calculus.steps_of(self.model) if calculus.known(self.model) else None
        self._move(parameters)

    def _move(self, parameters: list[str] | None) -> None:
        named = {n: p.detach() for n, p in self.model.named_parameters()}
        chosen = [n for n in named if parameters is None or any(fnmatchcase(n, q) for q in parameters)]
        if not chosen:
            raise ValueError(f"No parameter matches {parameters}: the names are {', '.join(named)}.")
        self.point = {n: named[n] for n in chosen}
        self.rest = {n: t for n, t in named.items() if n not in chosen}
        self.P = sum(t.numel() for t in self.point.values())

    def moving(self, parameters: list[str] | None) -> Losses:
        """The same losses as functions of other coordinates: those that match `parameters`."""
        self._activations()  # counted once for all
        found = copy.copy(self)
        found._move(parameters)
        return found

    @property
    def w(self) -> Tensor:
        """The weights as one vector (P,)."""
        return torch.cat([t.reshape(-1) for t in self.point.values()])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """(..., P) -> tensors by name, leading axes kept."""
        parts = v.split([t.numel() for t in self.point.values()], dim=-1)
        return {n: p.reshape(*v.shape[:-1], *t.shape) for p, (n, t) in zip(parts, self.point.items(), strict=True)}

    def flatten(self, tensors: dict[str, Tensor | None], leading: tuple[int, ...] = (), out=None) -> Tensor:
        """The inverse of `unflatten`, (*leading, P), into `out` if given; None stands for zeros."""
        w, at = next(iter(self.point.values())), 0
        out = w.new_empty(*leading, self.P) if out is None else out
        for n, t in self.point.items():
            part = out[..., at : at + t.numel()]
            part.zero_() if tensors[n] is None else part.copy_(tensors[n].reshape(*leading, -1))
            at += t.numel()
        return out

    def _batch(self, point: dict, x: Tensor, y: Tensor) -> Tensor:  # -> (n,) losses
        return loss_from_logits(self._logits(point, x), y, self.loss)

    def _logits(self, point: dict, x: Tensor) -> Tensor:
        return functional_call(Logits(self.model), {f"net.{n}": t for n, t in point.items()}, (x,))

    def _all(self, rows: Tensor | None) -> Tensor:
        return torch.arange(self.n, device=self.x.device) if rows is None else torch.as_tensor(rows).to(self.x.device)

    def _at(self, w: Tensor | None) -> dict[str, Tensor]:
        return self.point if w is None else self.unflatten(w)

    def chunk(self, vectors: int, most: int = 64) -> int:
        """Samples that fit the budget when each needs `vectors` arrays of length P beside its activations.

        On a CPU not more than `most`, which stay near its caches; a GPU waits for kernels to start, however small.
        """
        if self.chunk_size is not None:
            return self.chunk_size
        each = self.w.element_size() * (vectors * self.P + TAPE * self._activations())
        return max(1, min(most if self.w.device.type == "cpu" else self.n, self.memory // each))

    def _activations(self) -> int:
        """Numbers in one sample's activations, from one forward pass."""
        if not hasattr(self, "_size"):
            self._size = 0

            def count(_, __, out):
                self._size += out.numel() if isinstance(out, Tensor) else 0

            hooks = [m.register_forward_hook(count) for m in self.model.modules()]
            with torch.no_grad(), second_order_mode():
                self.model(self.x[:1])
            for hook in hooks:
                hook.remove()
        return self._size

    def _tape(self, point: dict, rows: Tensor, weights: Tensor | None = None) -> calculus.Tape:
        """With `weights`, all that is computed from it is a sum over the samples."""
        sums = weights is not None
        with torch.no_grad():
            x = calculus.data_of(self.model, self.x[rows])
            return calculus.Tape(self.steps, self.rest | point, x, self.y[rows], self.loss, tuple(point), sums, weights)

    def values(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Losses (m,) of the samples in `rows` (default: all) at the flat weights w (P,) (default: the model's own)."""
        point, chunks = self._at(w), self._all(rows).split(self.chunk(0, 256))
        with torch.no_grad(), second_order_mode():
            return torch.cat([self._batch(point, self.x[r], self.y[r]) for r in chunks])

    def value_and_gradient(
        self, w: Tensor | None = None, rows: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over `rows` at w, and its gradient (P,); with `weights` (m,), the weighted sum of their losses."""
        rows, value, gradient = self._all(rows), 0.0, torch.zeros_like(self.w)
        weights = self.w.new_full((len(rows),), 1 / len(rows)) if weights is None else weights.to(self.w)
        point = {n: t.detach() for n, t in self._at(w).items()}
        size = self.chunk(0, 128)
        for r, c in zip(rows.split(size), weights.split(size), strict=True):
            if self.steps is not None:
                tape = self._tape(point, r, c)
                batch, found = tape.losses @ c, tape.gradient()
            else:
                with torch.enable_grad(), second_order_mode():
                    leaves = {n: t.clone().requires_grad_(True) for n, t in point.items()}
                    batch = self._batch(leaves, self.x[r], self.y[r]) @ c
                    parts = torch.autograd.grad(batch, list(leaves.values()), materialize_grads=True)
                found = dict(zip(leaves, parts, strict=True))
            with torch.no_grad():
                value, gradient = value + batch.detach().double(), gradient + self.flatten(found)
        return value, gradient

    def gradient(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradient (P,) at w of the mean loss over `rows`."""
        return self.value_and_gradient(w, rows)[1]

    def sample_gradients(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradients (m, P) at w of the samples in `rows`."""
        point, parts = self._at(w), []

        def one(q, a, b):
            return grad(lambda u: self._batch(u, a[None], b[None])[0])(q)

        for r in self._all(rows).split(self.chunk(3)):
            if self.steps is not None:
                found = self._tape(point, r).gradient()
            else:
                with second_order_mode():
                    found = vmap(one, (None, 0, 0))(point, self.x[r], self.y[r])
            parts.append(self.flatten(found, (len(r),)))
        return torch.cat(parts)

    def hessian(
        self,
        w: Tensor | None = None,
        rows: Tensor | None = None,
        part: str = "full",
        weights: Tensor | None = None,
    ):
        """The map v (P,) -> H v (P,), H the Hessian at w of the mean loss over `rows`; with `weights` (m,), of the
        weighted sum of their losses. Cost of a call: two gradients.

        What the products share is kept between calls while it fits the memory budget.
        """
        _check_part(part)
        point, rows = self._at(w), self._all(rows)
        count, weights = (len(rows), self.w.new_ones(len(rows))) if weights is None else (1, weights.to(self.w))
        if self.steps is None:
            return lambda v: self._by_differentiation(v, point, rows, part, weights) / count
        chunks = rows.split(self.chunk(0))
        room = self.memory // (len(chunks[0]) * KEPT * self._activations() * self.w.element_size() + 1)
        pairs = list(zip(chunks, weights.split(len(chunks[0])), strict=True))
        tapes = [self._tape(point, r, c) for r, c in pairs[: max(1, room)]]

        def product(v: Tensor) -> Tensor:
            with torch.no_grad():
                direction, total = self.unflatten(v), torch.zeros_like(v)
                for i, (r, c) in enumerate(pairs):
                    tape = tapes[i] if i < len(tapes) else self._tape(point, r, c)
                    total += self.flatten(tape.product(direction, part))
            return total / count

        return product

    def _by_differentiation(self, v, point, rows, part, weights):
        direction, total, size = self.unflatten(v), 0.0, self.chunk(0, 256)
        with second_order_mode():
            for r, c in zip(rows.split(size), weights.split(size), strict=True):
                total = total + self.flatten(self._differentiated(point, direction, self.x[r], self.y[r], part, c))
        return total

    def _differentiated(self, point, direction, x, y, part, weights):
        """(d/dt) of the weighted gradients along `direction`, or of its part, by name: forward over reverse."""
        full = {}
        if part != "gauss_newton":
            full = jvp(grad(lambda q: self._batch(q, x, y) @ weights), (point,), (direction,))[1]
            if part == "full":
                return full
        f, df = jvp(lambda q: self._logits(q, x), (point,), (direction,))
        curved = jvp(grad(lambda u: loss_from_logits(u, y, self.loss) @ weights), (f,), (df,))[1]
        outer = vjp(lambda q: self._logits(q, x), point)[1](curved)[0]
        return outer if part == "gauss_newton" else {n: full[n] - outer[n] for n in point}

    def product(self, v: Tensor, w: Tensor | None = None, rows: Tensor | None = None, part: str = "full") -> Tensor:
        """H v (P,) for the Hessian at w of the mean loss over `rows`; `hessian` for more than one v."""
        return self.hessian(w, rows, part)(v)

    def sample_products(self, v: Tensor, rows: Tensor | None = None, part: str = "full") -> Tensor:
        """h_i v_i (m, P) for the samples in `rows`, each with its own vector v (m, P)."""
        rows = self._all(rows)
        pairs = zip(rows.split(self.chunk(4)), v.split(self.chunk(4)), strict=True)
        return torch.cat([SampleHessians(self, r, part)(u) for r, u in pairs])


class SampleHessians:
    """The Hessians h_i of the samples `rows` of `losses` as maps on vectors, one vector a sample; m samples at once.

    part: as everywhere, or, for the networks that the calculus knows, a positive semidefinite Q_i in place of h_i:
    "majorant" with -Q_i <= h_i <= Q_i (Theorem (thm:majorant)), "ridge" with -Q_i - mu_i <= h_i <= Q_i + mu_i for the
    `mu` (m,) set here (Theorem (thm:deflation)). What products share is kept while the samples stay.
    """

    def __init__(self, losses: Losses, rows: Tensor, part: str = "full"):
        if part not in ("majorant", "ridge") or losses.steps is None:
            _check_part(part)
        self.losses, self.rows, self.part = losses, rows.to(losses.w.device), part
        self.here, self.tape, self.sigma, self.mu = None, None, {}, None

    def _tape_of(self, local: Tensor) -> calculus.Tape:
        if self.here is None or not torch.equal(self.here, local):
            self.here, self.tape = local, self.losses._tape(self.losses.point, self.rows[local])
            self.tape.sigma = {i: t[local] for i, t in self.sigma.items()}
        self.tape.mu = None if self.mu is None else self.mu[local]
        return self.tape

    def balance(self, V: Tensor) -> None:
        """For "majorant" and "ridge": a step towards the weights of the couplings that are best along V (m, P)."""
        with torch.no_grad():
            tape = self._tape_of(torch.arange(len(self.rows), device=self.rows.device))
            tape.balance(self.losses.unflatten(V), self.part == "ridge")
            self.sigma = tape.sigma

    def gradients(self) -> Tensor:
        """Gradients (m, P) of all the samples."""
        if self.losses.steps is None:
            return self.losses.sample_gradients(rows=self.rows)
        with torch.no_grad():
            tape = self._tape_of(torch.arange(len(self.rows), device=self.rows.device))
            return self.losses.flatten(tape.gradient(), (len(self.rows),))

    def __call__(self, V: Tensor, local: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """h_i V_j (m, P), i = rows[local[j]] (default: all in order), for V (m, P); into `out` if given."""
        losses, local = self.losses, torch.arange(len(V), device=V.device) if local is None else local
        out = torch.empty_like(V) if out is None else out

        def one(direction, a, b):
            return losses._differentiated(losses.point, direction, a[None], b[None], self.part, losses.w.new_ones(1))

        if losses.steps is None:
            with second_order_mode():
                here = self.rows[local]
                found = vmap(one)(losses.unflatten(V), losses.x[here], losses.y[here])
                return losses.flatten(found, (len(V),), out)
        with torch.no_grad():
            self._tape_of(local).product(losses.unflatten(V), self.part, losses.unflatten(out))
            return out


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"part is {part!r}: choose one of {', '.join(PARTS)}.")


class _Operations(TorchDispatchMode):
    """torch's count of every matrix product, without the bookkeeping by module that makes `FlopCounterMode` slow."""

    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        count = flop_registry.get(operator.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations(function: Callable, *inputs, **options) -> tuple[object, int]:
    """What the function returns for these inputs, and the floating-point operations of its matrix products.

    As torch counts them: element-wise work and eigenvalue problems are left out.
    """
    with _Operations() as counter:
        found = function(*inputs, **options)
    return found, counter.total


class Logits(nn.Module):
    """The model with its output reduced to the logits, so that `functional_call` sees one tensor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.net, x)


# --- losses, gradients, products ------------------------------------------------------------------


def per_sample_losses(model, x, y, loss="cross_entropy", **options) -> Tensor:
    """Per-sample losses l_i(w) as (n,) float64, on the CPU."""
    return Losses(model, x, y, loss, **options).values().double().cpu()


def per_sample_gradients(model, x, y, loss="cross_entropy", **options) -> Tensor:
    """Per-sample gradients (n, P)."""
    return Losses(model, x, y, loss, **options).sample_gradients()


def hessian_vector_product(model, x, y, v, loss="cross_entropy", *, part="full", **options) -> Tensor:
    """H v (P,) of the mean loss, v (P,)."""
    return Losses(model, x, y, loss, **options).product(v, part=part)


def per_sample_hessian_vector_product(model, x, y, v, loss="cross_entropy", *, part="full", **options) -> Tensor:
    """h_i v_i (n, P), one vector a sample, v (n, P)."""
    return Losses(model, x, y, loss, **options).sample_products(v, part=part)


def dense_hessian(model, x, y, loss="cross_entropy", *, part="full", **options) -> Tensor:
    """The Hessian (P, P) of the mean loss, by products with the unit vectors: for small networks and tests."""
    losses = Losses(model, x, y, loss, **options)
    product = losses.hessian(part=part)
    return torch.stack([product(e) for e in torch.eye(losses.P, dtype=losses.w.dtype, device=losses.w.device)])


# --- Lanczos --------------------------------------------------------------------------------------


@dataclass
class Ritz:
    """Extreme Ritz values (m,) with their residuals, the products spent, and whether the Krylov space was
    exhausted: then every eigenvalue that the start has a share in is among the Ritz values.

    residual is that of the value larger in magnitude, other that of the opposite end.
    """

    low: Tensor
    high: Tensor
    residual: Tensor
    other: Tensor
    steps: Tensor
    exhausted: Tensor

    @property
    def value(self) -> Tensor:
        return torch.maximum(self.high.abs(), self.low.abs())

    @property
    def opposite(self) -> Tensor:
        """How far the end of the smaller magnitude reaches beyond zero, with its residual."""
        return torch.minimum(self.high.clamp_min(0), (-self.low).clamp_min(0)) + self.other

    def put(self, rows: Tensor, new: Ritz) -> None:
        for name, value in vars(new).items():
            getattr(self, name)[rows] = value


def lanczos(
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    max_steps: int,
    done: Callable[[Ritz, int], Tensor],
    orthogonal: bool = True,
    room: Tensor | None = None,
) -> Ritz:
    """Lanczos on m symmetric operators side by side.

    product(V, rows, out) applies operator rows[j] to V[j], into `out` (m, P) if it likes; start is (m, P). Rows for
    which `done(ritz, steps)` is true, or whose Krylov space is exhausted, leave the batch once they make up a quarter
    of it. `orthogonal`: after the three-term recurrence each vector is orthogonalised against all before it, which
    takes memory for max_steps vectors; without it three are kept, good for about 20 steps at a tolerance of 1e-4.
    `room` (3, at least m, P) is memory for these three: fresh memory costs as much as a pass.
    Source: Golub, Van Loan, Matrix Computations, section 10.1.
    """
    m, P = start.shape
    max_steps = min(max_steps, P)
    rows = torch.arange(m, device=start.device)  # operators still at work, in the order of the vectors
    zeros, eps = start.new_zeros(m), torch.finfo(start.dtype).eps
    out = Ritz(*(zeros.clone() for _ in range(4)), rows * 0, rows < 0)
    alpha, beta = start.new_zeros(m, max_steps), start.new_zeros(m, max_steps)
    if orthogonal:
        Q, slots, tiny = start.new_empty(m, max_steps + 1, P), max_steps + 1, 500 * eps
    else:
        Q, slots, tiny = start.new_empty(3, m, P) if room is None else room[:, :m], 3, max(1e-9, 16 * eps)

    def vector(i):  # the i-th of the basis (m, P)
        return Q[:, i] if orthogonal else Q[i % slots]

    torch.div(start, start.norm(dim=1, keepdim=True), out=vector(0))
    for j in range(1, max_steps + 1):
        v, z = vector(j - 1), vector(j)
        found = product(v, rows, z)
        if found.data_ptr() != z.data_ptr():
            z.copy_(found)
        a = _dots(v, z)
        if j > 1:
            z.addcmul_(vector(j - 2), length[:, None], value=-1)  # noqa: F821
        z.addcmul_(v, a[:, None], value=-1)
        if orthogonal:
            _orthogonalise(z, Q[:, :j])
        length = z.norm(dim=1)
        alpha[rows, j - 1], beta[rows, j - 1] = a, length
        scale = torch.maximum(alpha[rows, :j].abs().amax(1), beta[rows, : j - 1].amax(1) if j > 1 else zeros[rows])
        exhausted = length <= tiny * scale
        ritz = _ritz(alpha[rows, :j], beta[rows, :j], exhausted)
        out.put(rows, ritz)
        keep = ~(exhausted | done(ritz, j))
        if j == max_steps or not keep.any():
            break
        if exhausted.any() or keep.sum() <= 0.75 * len(rows):
            rows, length, left = rows[keep], length[keep], int(keep.sum())
            for i in range(0 if orthogonal else j - 1, j + 1):
                vector(i)[:left] = vector(i)[keep]
            Q = Q[:left] if orthogonal else Q[:, :left]
        vector(j).div_(length[:, None])
    return out


def _dots(u: Tensor, v: Tensor) -> Tensor:
    """Row by row u.v, (m, P) -> (m,); on the CPU one BLAS call a row is three times as fast as anything batched."""
    if u.device.type == "cpu":
        return torch.stack([torch.dot(a, b) for a, b in zip(u, v)])
    return (u * v).sum(1)


def _orthogonalise(z: Tensor, Q: Tensor) -> None:
    """z <- z - Q^T Q z in place, z (m, P), Q (m, j, P) with orthonormal rows."""
    if z.device.type == "cpu":
        for x, B in zip(z, Q):
            x.addmv_(B.T, B @ x, alpha=-1)
    else:
        z -= (Q.mT @ (Q @ z[:, :, None]))[:, :, 0]


def _ritz(alpha: Tensor, beta: Tensor, exhausted: Tensor) -> Ritz:
    """Extreme eigenvalues of the tridiagonal matrices alpha (m, j), beta (m, j), the last beta leading outside."""
    off, j = beta[:, :-1], alpha.shape[1]
    theta, s = torch.linalg.eigh(torch.diag_embed(alpha) + torch.diag_embed(off, -1))  # reads the lower triangle
    tail = beta[:, -1:] * s[:, -1, [0, -1]].abs()  # residuals of the two ends
    top = (theta[:, -1].abs() >= theta[:, 0].abs()).long()[:, None]
    residual, other = (tail.gather(1, i)[:, 0] for i in (top, 1 - top))
    return Ritz(theta[:, 0], theta[:, -1], residual, other, torch.full_like(top[:, 0], j), exhausted)


def lanczos_epsilon(steps: int, P: int, failure: float) -> float:
    """The gap eps of Theorem (thm:lanczos): with probability 1 - failure the spectrum of width W of a symmetric
    P x P matrix exceeds the Ritz interval after `steps` steps by at most eps W at each end. 0.5 if nothing can be said.

    Solves sqrt((1-eps)/eps) / cosh(2 (q-1) artanh sqrt eps) = (failure/2) / sqrt(2 P/pi) for q = steps. The start must
    be uniform on the sphere and independent of the matrix; a gradient or any other chosen start certifies nothing.
    """
    if not 0 < failure < 1:
        raise ValueError("The confidence asked for is not between 0 and 1: give one such as 0.95.")
    goal = math.log(failure / 2) - 0.5 * math.log(2 * P / math.pi)

    def excess(eps):
        angle = 2 * (steps - 1) * math.atanh(math.sqrt(eps))
        return 0.5 * math.log((1 - eps) / eps) - (angle + math.log1p(math.exp(-2 * angle)) - math.log(2)) - goal

    return 0.5 if excess(0.5) > 0 else brentq(excess, 1e-12, 0.5)


def uniform_start(shape, losses: Losses, seed: int) -> Tensor:
    """Uniform directions from a stream of their own, so that they are independent of weights drawn with any seed."""
    generator = torch.Generator().manual_seed(0x5EED_0F_1A7C05 + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(losses.w)


def _certified(ritz: Ritz, P: int, failure: float) -> Tensor:
    """Upper ends (m,) of Theorem (thm:lanczos) from a uniform start; inf where eps >= 1/2, exact where exhausted."""
    epsilon = {q: lanczos_epsilon(q, P, failure) for q in set(ritz.steps.tolist())}
    eps = torch.tensor([epsilon[q] for q in ritz.steps.tolist()], dtype=torch.float64).to(ritz.value.device)
    eps = torch.where(ritz.exhausted, 0.0, eps)
    upper = ritz.value + eps * (ritz.high - ritz.low) / (1 - 2 * eps)
    return torch.where(eps < 0.5, upper, torch.inf)


def per_sample_hessian_norms(
    model,
    x,
    y,
    loss="cross_entropy",
    *,
    certify=False,
    confidence=0.95,
    tolerance=1e-4,
    max_steps=80,
    seed=0,
    part="full",
    progress=None,
    **options,
) -> NormEstimate:
    """Spectral norms of the n per-sample Hessians h_i, batched Lanczos; NormEstimate with tensors of length n.

    Without `certify` the start is the sample's gradient (fast, residual only), and a second, random start, fully
    orthogonalised, follows wherever the two ends of the spectrum are within 30 % of each other or 20 steps were not
    enough; `upper` is nan. A sample is done when the residual is `tolerance` of the value and the other end, with its
    own residual, cannot overtake it.
    With `certify` the start is uniform and runs until the interval is narrower than `tolerance` (at
    least 5 %) of the value or `max_steps` are spent; all n upper ends hold together, at every step, with probability
    `confidence` over the start, for Hessians that do not depend on it. `upper` is inf while nothing can be said.
    Cost: 8 to 15 products a sample, with `certify` about 50. Memory: the option `memory` [bytes].
    Rounding is not covered by the certificate. Source: Theorem (thm:lanczos).
    """
    losses = Losses(model, x, y, loss, **options)
    failure, width = (1 - confidence) / losses.n, max(tolerance, 0.05)
    parts, room = [], None

    def settled(ritz, j):
        if j < LEAST:
            return torch.zeros_like(ritz.exhausted)
        near = tolerance * ritz.value
        return (ritz.residual <= near) & ((ritz.opposite <= ritz.value) | (ritz.other <= near))

    def narrow(ritz, j):
        return _certified(ritz, losses.P, failure) - ritz.value <= width * ritz.value

    for rows in torch.arange(losses.n, device=losses.x.device).split(losses.chunk(max_steps + 4 if certify else 6)):
        operator = SampleHessians(losses, rows, part)
        if certify:
            # one direction serves all samples: the event of the theorem is about each of them
            start = uniform_start((1, losses.P), losses, seed).expand(len(rows), -1)
            ritz = lanczos(operator, start, max_steps=max_steps, done=narrow)
            upper = _certified(ritz, losses.P, failure)
            converged = upper - ritz.value <= width * ritz.value
        else:
            start = operator.gradients()
            start[start.norm(dim=1) == 0] = 1.0
            room = start.new_empty(3, *start.shape) if room is None else room
            few = min(max_steps, UNORTHOGONAL)
            ritz = lanczos(operator, start, max_steps=few, done=settled, orthogonal=False, room=room)
            # a second, random start: where the other end may be the larger one, where the gradient lies in a small
            # invariant space, which says nothing about the rest, and where few steps did not settle it
            close = torch.minimum(ritz.low.abs(), ritz.high.abs()) > 0.7 * ritz.value
            close |= (ritz.steps < LEAST) | ~(ritz.exhausted | settled(ritz, few))
            for again in close.nonzero()[:, 0].split(losses.chunk(max_steps + 4)) if close.any() else ():
                start = uniform_start((len(again), losses.P), losses, seed)
                second = lanczos(SampleHessians(losses, rows[again], part), start, max_steps=max_steps, done=settled)
                ritz.put(again, _better(Ritz(*(value[again] for value in vars(ritz).values())), second))
            upper, converged = torch.full_like(ritz.value, torch.nan), ritz.residual <= tolerance * ritz.value
        parts.append((ritz.value, ritz.value, upper, ritz.residual, ritz.steps, converged))
        if progress is not None:
            progress(len(rows))
    return NormEstimate(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _better(a: Ritz, b: Ritz) -> Ritz:
    """Two runs on the same operators as one: the wider ends, the residual of the larger value, steps added up."""
    first = a.value >= b.value
    residual, other = (torch.where(first, getattr(a, n), getattr(b, n)) for n in ("residual", "other"))
    low, high = torch.minimum(a.low, b.low), torch.maximum(a.high, b.high)
    return Ritz(low, high, residual, other, a.steps + b.steps, a.exhausted & b.exhausted)


def operator_norm(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    failure: float | None = None,
    least: int = LEAST,
) -> NormEstimate:
    """‖A‖ of one symmetric operator v -> A v on vectors (P,), by Lanczos from `start` (P,).

    At least `least` steps. With `failure` the upper end holds with probability 1 - failure over a uniform start, and
    the run goes on until it is within 5 % of the value. Source: Theorem (thm:lanczos).
    """

    def upper(ritz):
        if failure is None:
            return torch.full_like(ritz.value, torch.nan)
        return _certified(ritz, len(start), failure)

    def done(ritz, j):
        settled = (ritz.residual <= tolerance * ritz.value) & (ritz.opposite <= ritz.value) & (j >= least)
        return settled if failure is None else settled & (upper(ritz) <= 1.05 * ritz.value)

    ritz = lanczos(lambda v, rows, out: product(v[0])[None], start[None], max_steps=max_steps, done=done)
    value, residual = ritz.value.item(), ritz.residual.item()
    return NormEstimate(value, value, upper(ritz).item(), residual, int(ritz.steps), residual <= tolerance * value)


def hessian_norm(
    model,
    x,
    y,
    loss="cross_entropy",
    *,
    estimator="lanczos",
    certify=False,
    confidence=0.95,
    tolerance=1e-4,
    max_steps=80,
    seed=0,
    part="full",
    **options,
) -> NormEstimate:
    """Spectral norm of the Hessian H_k of the mean loss over the k samples given.

    estimator "lanczos": random start, until the residual is `tolerance` of the value; with `certify`
    the upper end of Theorem (thm:lanczos) at the steps spent. "pyhessian": PyHessian's power iteration behind
    `utils.pyhessian_adapter`: three starts, tight stopping, a rescaled operator, and a residual computed here, since
    it reports none. "exact": a dense eigenvalue decomposition (P products, P x P memory; float64 rounding only).
    """
    losses = Losses(model, x, y, loss, **options)
    if estimator == "exact":
        H = dense_hessian(model, x, y, loss, part=part, **options)
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        top = int(values.abs().argmax())
        value, v = values[top].abs().item(), vectors[:, top]
        residual = (losses.product(v, part=part) - values[top] * v).norm().item()
        return NormEstimate(value, value - residual, value + residual, residual, losses.P, True)
    if estimator == "pyhessian":
        if part != "full":
            raise ValueError(f"PyHessian knows the whole Hessian only, not the {part} part: take estimator lanczos.")
        e = pyhessian_adapter.eigenvalue(losses, seed=seed)
        return NormEstimate(e.value, e.value, math.nan, e.residual, e.iterations, e.residual <= tolerance * e.value)
    if estimator != "lanczos":
        raise ValueError(f"estimator is {estimator!r}: choose lanczos, pyhessian or exact.")
    return operator_norm(
        losses.hessian(part=part),
        uniform_start((losses.P,), losses, seed),
        tolerance=tolerance,
        max_steps=max_steps,
        failure=1 - confidence if certify else None,
    )


@dataclass(frozen=True)
class DifferenceNorms:
    """‖H_k‖ (`mean`), ‖H_{k+1} - H_k‖ (`step`), ‖H_k - H_n‖ (`limit`) for each k of `sizes`: NormEstimates."""

    sizes: list[int]
    mean: list[NormEstimate]
    step: list[NormEstimate]
    limit: list[NormEstimate]


def hessian_difference_norms(
    model,
    x,
    y,
    sizes,
    order=None,
    loss="cross_entropy",
    *,
    arriving=None,
    tolerance=1e-3,
    max_steps=60,
    seed=0,
    **options,
) -> DifferenceNorms:
    """Norms of H_k and of the exact differences H_{k+1} - H_k = (h_{k+1} - H_k)/(k+1) and H_k - H_n.

    `order` (n,) is the order in which samples come, k < n; `arriving`, an index, is the sample that comes after every
    k in place of the order's own. Each difference is the Hessian of one weighted sum of losses, never of a subsample.
    Cost of one size: 8 to 20 products over k, over k + 1 and over n samples, a product over m samples costing about
    two gradients of m losses; a grid of sizes costs the sum.
    """
    losses = Losses(model, x, y, loss, **options)
    order = torch.arange(losses.n) if order is None else torch.as_tensor(order)
    order, n = order.to(losses.x.device), losses.n
    if not all(1 <= k < n for k in sizes):
        raise ValueError(f"sizes {list(sizes)} have to lie between 1 and n - 1 = {n - 1}: choose such k.")
    start, found = uniform_start((losses.P,), losses, seed), DifferenceNorms(list(sizes), [], [], [])
    for k in sizes:
        first, new = order[:k], order[k : k + 1] if arriving is None else order.new_tensor([arriving])
        ones = losses.w.new_ones(n)
        for norms, rows, weights in (
            (found.mean, first, ones[:k] / k),
            (found.step, torch.cat([first, new]), torch.cat([-ones[:k] / k, ones[:1]]) / (k + 1)),
            (found.limit, order, torch.cat([ones[:k] / k, 0 * ones[k:]]) - ones / n),
        ):
            H = losses.hessian(rows=rows, weights=weights)
            norms.append(operator_norm(H, start, tolerance=tolerance, max_steps=max_steps))
    return found


# --- trace and spectrum ---------------------------------------------------------------------------


def hessian_trace(
    model, x, y, loss="cross_entropy", *, estimator="hutchinson", probes=32, seed=0, part="full", **options
) -> tuple[float, float]:
    """An estimate of the trace of H_k, and its standard error, from `probes` products.

    estimator "hutchinson": the mean of v^T H v over Rademacher v (Hutchinson 1990). "hutch++": a third of the products
    finds the range Q of H on random signs, a third takes the trace of Q^T H Q exactly, a third is Hutchinson's on the
    rest (1 - QQ^T) H (1 - QQ^T); the standard error is that of the rest, given Q (Meyer, Musco, Musco, Woodruff 2021).
    "pyhessian": PyHessian's own probes without its stopping rule. The number of probes is fixed beforehand: a rule
    on the running mean biases the estimate. Raises ValueError for fewer than 2 probes (hutch++: 6).
    """
    losses = Losses(model, x, y, loss, **options)
    least = {"hutchinson": 2, "pyhessian": 2, "hutch++": 6}
    if estimator not in least:
        raise ValueError(f"estimator is {estimator!r}: choose hutchinson, hutch++ or pyhessian.")
    if probes < least[estimator]:
        raise ValueError(f"{estimator} with {probes} probes has no standard error: give at least {least[estimator]}.")
    if estimator == "pyhessian":
        if part != "full":
            raise ValueError(f"PyHessian knows the whole Hessian only, not the {part} part: take estimator hutchinson.")
        return pyhessian_adapter.trace(losses, probes=probes, seed=seed)[:2]
    product = losses.hessian(part=part)
    signs, known = torch.sign(uniform_start((probes, losses.P), losses, seed)), 0.0
    if estimator == "hutch++":
        third = min(probes // 3, losses.P)
        Q = torch.linalg.qr(torch.stack([product(v) for v in signs[:third]], 1)).Q  # (P, third)
        known = sum((q @ product(q)).item() for q in Q.T)
        signs = signs[2 * third :]
        signs = signs - (signs @ Q) @ Q.T
    values = torch.stack([v @ product(v) for v in signs])
    return known + values.mean().item(), (values.std() / math.sqrt(len(values))).item()


@dataclass(frozen=True)
class SpectralDensity:
    """Ritz values `nodes` and `weights` (probes, steps) of stochastic Lanczos quadrature; a row of weights sums to 1.

    For each probe the weight above t estimates the share of the P eigenvalues above t.
    """

    nodes: np.ndarray
    weights: np.ndarray
    P: int

    def count(self, thresholds, sign: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many eigenvalues have sign * value > t, for each t: mean over the probes with a 95 % band (t quantile).

        The band is that of the probes; the quadrature's own error falls with the steps. Below about P/1000 of a
        probe's spread a count is noise: one eigenvalue has weight 1/P.
        """
        from scipy.stats import t as student

        above = sign * self.nodes[:, :, None] > np.asarray(thresholds)
        counts = self.P * (self.weights[:, :, None] * above).sum(1)  # (probes, thresholds)
        error = counts.std(0, ddof=1) / math.sqrt(len(counts)) * student.ppf(0.975, len(counts) - 1)
        return counts.mean(0), counts.mean(0) - error, counts.mean(0) + error

    def moment(self, power: int) -> tuple[float, float]:
        """tr H^power and its standard error; exact in the quadrature up to power 2 steps - 1."""
        values = self.P * (self.weights * self.nodes**power).sum(1)
        return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def spectral_density(
    model, x, y, loss="cross_entropy", *, probes=8, steps=40, seed=0, part="full", **options
) -> SpectralDensity:
    """The spectrum of H_k by stochastic Lanczos quadrature: `steps` products for each of `probes` uniform starts.

    Full reorthogonalisation; memory probes x steps x P. Source: Golub, Welsch (1969); Ubaru, Chen, Saad (2017).
    Raises ValueError for fewer than 2 probes, which have no band.
    """
    if probes < 2 or steps < 1:
        raise ValueError(f"There are {probes} probes and {steps} steps: give at least 2 probes and 1 step.")
    losses = Losses(model, x, y, loss, **options)
    product, nodes, weights = losses.hessian(part=part), [], []
    for v in uniform_start((probes, losses.P), losses, seed):
        alpha, beta, basis, v = [], [], [], v / v.norm()
        for _ in range(min(steps, losses.P)):
            basis.append(v)
            z = product(v)
            alpha.append((v @ z).item())
            for _ in range(2):
                for b in basis:
                    z = z - (b @ z) * b
            length = z.norm().item()
            if length <= 1e-13 * max(map(abs, alpha)):
                break
            beta.append(length)
            v = z / length
        theta, s = np.linalg.eigh(
            np.diag(alpha) + np.diag(beta[: len(alpha) - 1], 1) + np.diag(beta[: len(alpha) - 1], -1)
        )
        pad = min(steps, losses.P) - len(theta)  # an exhausted Krylov space has fewer nodes: repeat one with weight 0
        nodes.append(np.r_[theta, np.full(pad, theta[0])])
        weights.append(np.r_[s[0] ** 2, np.zeros(pad)])
    return SpectralDensity(np.stack(nodes), np.stack(weights), losses.P)


# --- blocks ---------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Groups of parameters, label -> names: what the block matrix of norms is taken over.

    A ViT has embedding (patches, positions, CLS), Q, K, V, O, W1, W2, LN of every layer, and head (with the final
    LayerNorm); weight and bias stay together. Any other module: one group for each submodule that owns parameters.
    """
    roles = {
        "attention.query": "Q",
        "attention.key": "K",
        "attention.value": "V",
        "attention.out": "O",
        "mlp.fc1": "W1",
        "mlp.fc2": "W2",
        "norm1": "LN",
        "norm2": "LN",
    }
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0] or name
        if isinstance(model, calculus.ViT):
            if owner.startswith("blocks."):
                _, layer, inner = owner.split(".", 2)
                owner = f"{roles[inner]} {int(layer) + 1}"
            else:
                owner = "head" if owner in ("head", "norm") else "embedding"
        groups.setdefault(owner, []).append(name)
    return (
        dict(sorted(groups.items(), key=lambda g: (g[0] == "head", g[0] != "embedding")))
        if "head" in groups
        else groups
    )


@dataclass(frozen=True)
class BlockNorms:
    """Spectral norms (m, m) of the blocks of H_k between groups of parameters; symmetric.

    residual (m, m): |B^T B v - s^2 v| / s of the unit vector behind each norm s.
    """

    groups: list[str]
    values: np.ndarray
    residual: np.ndarray


def hessian_block_norms(
    model, x, y, loss="cross_entropy", *, groups=None, tolerance=1e-2, max_steps=20, seed=0, **options
) -> BlockNorms:
    """‖H_k[g, g']‖ for every pair of groups of parameters (default: `parameter_groups`).

    Lanczos on B^T B for the block B = H[g, g'], two products a step, each of which walks only through what the two
    groups touch, until the residual is `tolerance` of the value. Cost: about m(m+1)/2 times 10 products.
    """
    losses = Losses(model, x, y, loss, **options)
    groups = parameter_groups(model) if groups is None else groups
    names, m = list(groups), len(groups)
    values, residual = np.zeros((m, m)), np.zeros((m, m))
    for i in range(m):
        for j in range(i + 1):
            pair = losses.moving([*groups[names[i]], *groups[names[j]]])
            inside = {n: torch.full_like(t, n in groups[names[j]]) for n, t in pair.point.items()}
            mask = pair.flatten(inside).bool()  # coordinates of the second group
            H, start = pair.hessian(), torch.where(mask, uniform_start((pair.P,), pair, seed), 0.0)
            other = mask if i == j else ~mask
            norm = operator_norm(
                lambda v, H=H, a=other, b=mask: torch.where(b, H(torch.where(a, H(v), 0.0)), 0.0),
                start,
                tolerance=2 * tolerance,
                max_steps=min(max_steps, int(mask.sum())),
                least=3,
            )
            s = math.sqrt(norm.value)
            values[i, j] = values[j, i] = s
            residual[i, j] = residual[j, i] = norm.residual / s if s > 0 else 0.0
    return BlockNorms(names, values, residual)
