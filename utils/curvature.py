"""Losses, gradients and Hessians of the classifier: products, norms with residuals, certificates, traces.

Every function works on a copy of the model (eval mode, float64 unless said otherwise, attention by
its mathematical kernel) and leaves the model handed in as it was. Flat vectors of length P follow
`named_parameters`; `parameters` restricts them by name patterns (`["head.*"]`). Second derivatives
are `jvp(grad)`: forward over reverse, which is right on every module, `F.layer_norm` included.

L_k is the mean loss of k samples, H_k its Hessian, h_i the Hessian of sample i alone.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from utils.models import (
    logits,
    loss_from_logits,
    prepared_copy,
    refuse_random_or_batch_dependent,
    second_order_mode,
)


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

    x (n, ...) and y (n,) are the samples, `parameters` the name patterns of the coordinates that move.
    Raises ValueError for patterns that match nothing and for models whose loss of a sample is random
    or depends on other samples.
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
        chunk_size: int = 64,
    ):
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x has {len(x)} samples and y has {len(y)}: give as many labels as inputs, at least one.")
        if device is None:
            device = next(model.parameters()).device
        self.model = prepared_copy(model, dtype, device)
        self.x = x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype)
        self.y, self.loss, self.chunk_size = y.to(device), loss, chunk_size
        refuse_random_or_batch_dependent(self.model, self.x)
        named = {n: p.detach() for n, p in self.model.named_parameters()}
        chosen = [n for n in named if parameters is None or any(fnmatchcase(n, q) for q in parameters)]
        if not chosen:
            raise ValueError(f"No parameter matches {parameters}: the names are {', '.join(named)}.")
        for n, p in self.model.named_parameters():  # the others are constants: no graph is kept for them
            p.requires_grad_(n in chosen)
        self.point = {n: named[n] for n in chosen}
        self.n, self.P = len(x), sum(t.numel() for t in self.point.values())

    @property
    def w(self) -> Tensor:
        """The weights as one vector (P,)."""
        return torch.cat([t.reshape(-1) for t in self.point.values()])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """(..., P) -> tensors by name, leading axes kept."""
        parts = v.split([t.numel() for t in self.point.values()], dim=-1)
        return {n: p.reshape(*v.shape[:-1], *t.shape) for p, (n, t) in zip(parts, self.point.items(), strict=True)}

    @staticmethod
    def _flatten(tensors: dict[str, Tensor], leading: int) -> Tensor:
        return torch.cat([t.reshape(*t.shape[:leading], -1) for t in tensors.values()], dim=-1)

    def _batch(self, point: dict, x: Tensor, y: Tensor) -> Tensor:  # -> (n,) losses
        return loss_from_logits(
            functional_call(_Logits(self.model), {f"net.{n}": t for n, t in point.items()}, (x,)), y, self.loss
        )

    def _one(self, point: dict, x: Tensor, y: Tensor) -> Tensor:  # one sample -> its loss
        return self._batch(point, x[None], y[None])[0]

    def _chunks(self, rows: Tensor):
        return rows.split(self.chunk_size)

    def _all(self, rows: Tensor | None) -> Tensor:
        return torch.arange(self.n, device=self.x.device) if rows is None else torch.as_tensor(rows)

    def _at(self, w: Tensor | None) -> dict[str, Tensor]:
        return self.point if w is None else self.unflatten(w)

    def values(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Losses (m,) of the samples in `rows` (default: all) at the flat weights w (P,) (default: the model's own)."""
        point = self._at(w)
        with torch.no_grad(), second_order_mode():
            return torch.cat([self._batch(point, self.x[r], self.y[r]) for r in self._all(rows).split(1024)])

    def value_and_gradient(self, w: Tensor | None = None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss over `rows` at w, and its gradient (P,)."""
        rows, value = self._all(rows), 0.0
        point = {n: t.detach().clone().requires_grad_(True) for n, t in self._at(w).items()}
        total = [torch.zeros_like(t) for t in point.values()]
        with torch.enable_grad(), second_order_mode():
            for r in rows.split(256):
                batch = self._batch(point, self.x[r], self.y[r]).sum()
                found = torch.autograd.grad(batch, list(point.values()), materialize_grads=True)
                value, total = value + batch.detach().double(), [a + b for a, b in zip(total, found, strict=True)]
        return value / len(rows), torch.cat([t.reshape(-1) for t in total]) / len(rows)

    def gradient(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradient (P,) at w of the mean loss over `rows`."""
        return self.value_and_gradient(w, rows)[1]

    def sample_gradients(self, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Gradients (m, P) at w of the samples in `rows`."""
        point = self._at(w)
        with second_order_mode():
            return torch.cat(
                [
                    self._flatten(vmap(grad(self._one), (None, 0, 0))(point, self.x[r], self.y[r]), 1)
                    for r in self._chunks(self._all(rows))
                ]
            )

    def product(self, v: Tensor, w: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """H v (P,) for the Hessian at w of the mean loss over `rows`. Cost: about two gradients."""
        point, rows, direction, total = self._at(w), self._all(rows), self.unflatten(v), 0.0
        with second_order_mode():
            for r in rows.split(256):
                a, b = self.x[r], self.y[r]
                g = grad(lambda q, a=a, b=b: self._batch(q, a, b).sum())
                total = total + self._flatten(jvp(g, (point,), (direction,))[1], 0)
        return total / len(rows)

    def sample_products(self, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """h_i v_i (m, P) for the samples in `rows`, each with its own vector v (m, P)."""
        rows = self._all(rows)

        def one(direction, a, b):
            return jvp(lambda q: grad(self._one)(q, a, b), (self.point,), (direction,))[1]

        with second_order_mode():
            return torch.cat(
                [
                    self._flatten(vmap(one)(self.unflatten(u), self.x[r], self.y[r]), 1)
                    for r, u in zip(self._chunks(rows), self._chunks(v), strict=True)
                ]
            )


class _Logits(nn.Module):
    """The model with its output reduced to the logits, so that `functional_call` sees one tensor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.net, x)


# --- losses, gradients, products ------------------------------------------------------------------


def per_sample_losses(model, x, y, loss="cross_entropy", **options) -> Tensor:
    """Per-sample losses l_i(w) as (n,) float64."""
    return Losses(model, x, y, loss, **options).values().double()


def per_sample_gradients(model, x, y, loss="cross_entropy", **options) -> Tensor:
    """Per-sample gradients (n, P)."""
    return Losses(model, x, y, loss, **options).sample_gradients()


def hessian_vector_product(model, x, y, v, loss="cross_entropy", **options) -> Tensor:
    """H v (P,) of the mean loss, v (P,)."""
    return Losses(model, x, y, loss, **options).product(v)


def per_sample_hessian_vector_product(model, x, y, v, loss="cross_entropy", **options) -> Tensor:
    """h_i v_i (n, P), one vector a sample, v (n, P)."""
    return Losses(model, x, y, loss, **options).sample_products(v)


def dense_hessian(model, x, y, loss="cross_entropy", **options) -> Tensor:
    """The Hessian (P, P) of the mean loss, by products with the unit vectors: for small networks and tests."""
    losses = Losses(model, x, y, loss, **options)
    units = torch.eye(losses.P, dtype=losses.w.dtype, device=losses.w.device)
    return torch.cat([vmap(losses.product)(e) for e in units.split(max(1, 512 // losses.n))])


# --- Lanczos --------------------------------------------------------------------------------------


@dataclass
class _Ritz:
    """Extreme Ritz values (m,), the residual of the one larger in magnitude, the products spent, and whether the
    Krylov space was exhausted: then every eigenvalue that the start has a share in is among the Ritz values."""

    low: Tensor
    high: Tensor
    residual: Tensor
    steps: Tensor
    exhausted: Tensor

    @property
    def value(self) -> Tensor:
        return torch.maximum(self.high.abs(), self.low.abs())


def lanczos(
    product: Callable[[Tensor, Tensor], Tensor], start: Tensor, *, max_steps: int, done: Callable[[_Ritz, int], Tensor]
) -> _Ritz:
    """Lanczos on m symmetric operators side by side, with full reorthogonalisation (twice).

    product(V, rows) applies operator rows[j] to V[j]; start is (m, P). Rows for which
    `done(ritz, steps)` is true, or whose Krylov space is exhausted, leave the batch.
    Source: Golub, Van Loan, Matrix Computations, section 10.1.
    """
    m, P = start.shape
    max_steps = min(max_steps, P)
    rows = torch.arange(m, device=start.device)
    V = [start / start.norm(dim=1, keepdim=True)]
    alpha, beta = start.new_zeros(m, max_steps), start.new_zeros(m, max_steps)
    steps = torch.zeros(m, dtype=torch.long, device=start.device)
    out = _Ritz(*(start.new_zeros(m) for _ in range(3)), steps, steps.bool())
    for j in range(1, max_steps + 1):
        z = product(V[-1], rows)
        alpha[rows, j - 1] = (V[-1] * z).sum(1)
        basis = torch.stack(V, 1)  # (active, j, P)
        for _ in range(2):
            z = z - torch.einsum("mjp,mj->mp", basis, torch.einsum("mjp,mp->mj", basis, z))
        length = z.norm(dim=1)
        beta[rows, j - 1] = length
        off = beta[rows, : j - 1]
        T = torch.diag_embed(alpha[rows, :j]) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        theta, s = torch.linalg.eigh(T)
        top = torch.where(theta[:, -1].abs() >= theta[:, 0].abs(), s[:, -1, -1].abs(), s[:, -1, 0].abs())
        exhausted = length <= 1e-13 * torch.maximum(theta[:, -1].abs(), theta[:, 0].abs())
        ritz = _Ritz(theta[:, 0], theta[:, -1], length * top, torch.full_like(rows, j), exhausted)
        out.low[rows], out.high[rows], out.residual[rows], out.steps[rows] = ritz.low, ritz.high, ritz.residual, j
        out.exhausted[rows] = exhausted
        keep = ~(done(ritz, j) | exhausted)
        if not keep.any():
            break
        if not keep.all():
            rows, V, z, length = rows[keep], [b[keep] for b in V], z[keep], length[keep]
        V.append(z / length[:, None])
    return out


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


def _start(shape, losses: Losses, seed: int) -> Tensor:
    """Uniform directions from a stream of their own, so that they are independent of weights drawn with any seed."""
    generator = torch.Generator().manual_seed(0x5EED_0F_1A7C05 + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(losses.w)


def _certified(ritz: _Ritz, steps: Tensor, P: int, failure: float) -> Tensor:
    eps = torch.tensor([lanczos_epsilon(int(q), P, failure) for q in steps.tolist()], dtype=torch.float64)
    eps = eps.to(ritz.value.device)
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
    progress=None,
    **options,
) -> NormEstimate:
    """Spectral norms of the n per-sample Hessians h_i, batched Lanczos; NormEstimate with tensors of length n.

    Without `certify` the start is the sample's gradient (fast, residual only), and a second, random
    start follows wherever the two ends of the spectrum are within 30 % of each other; `upper` is nan.
    With `certify` the start is uniform and runs until the interval is narrower than `tolerance` (at
    least 5 %) of the value or `max_steps` are spent; all n upper ends hold together with probability
    `confidence` over the start. Cost: 10 to 20 products a sample, with `certify` about 50.
    Rounding is not covered by the certificate. Source: Theorem (thm:lanczos).
    """
    losses = Losses(model, x, y, loss, **options)
    failure, width = (1 - confidence) / losses.n, max(tolerance, 0.05)
    parts = []
    for rows in losses._chunks(torch.arange(losses.n, device=losses.x.device)):

        def product(v, local, rows=rows):
            return losses.sample_products(v, rows[local])

        def settled(ritz, j):
            return (ritz.residual <= tolerance * ritz.value) if j >= 8 else torch.zeros_like(ritz.value, dtype=bool)

        def certified(ritz, j):
            return _certified(ritz, ritz.steps, losses.P, failure) - ritz.value <= width * ritz.value

        if certify:
            # one direction serves all samples: the event of the theorem is about each of them
            start = _start((1, losses.P), losses, seed).expand(len(rows), -1)
            ritz = lanczos(product, start, max_steps=max_steps, done=certified)
            upper = _certified(ritz, ritz.steps, losses.P, failure)
            converged = upper - ritz.value <= width * ritz.value
        else:
            start = losses.sample_gradients(rows=rows)
            start[start.norm(dim=1) == 0] = 1.0
            ritz = lanczos(product, start, max_steps=max_steps, done=settled)
            close = torch.minimum(ritz.low.abs(), ritz.high.abs()) > 0.7 * ritz.value
            close |= ritz.steps < 8  # a gradient inside a small invariant space says nothing about the rest
            if close.any():
                again = lanczos(
                    lambda v, local, r=rows[close]: losses.sample_products(v, r[local]),
                    _start((int(close.sum()), losses.P), losses, seed),
                    max_steps=max_steps,
                    done=settled,
                )
                better = again.value > ritz.value[close]
                ritz.residual[close] = torch.where(better, again.residual, ritz.residual[close])
                ritz.low[close] = torch.minimum(ritz.low[close], again.low)
                ritz.high[close] = torch.maximum(ritz.high[close], again.high)
                ritz.steps[close] += again.steps
            upper, converged = torch.full_like(ritz.value, torch.nan), ritz.residual <= tolerance * ritz.value
        parts.append((ritz.value, ritz.value, upper, ritz.residual, ritz.steps, converged))
        if progress is not None:
            progress(len(rows))
    return NormEstimate(*(torch.cat(column) for column in zip(*parts, strict=True)))


def operator_norm(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    failure: float | None = None,
) -> NormEstimate:
    """‖A‖ of one symmetric operator v -> A v on vectors (P,), by Lanczos from `start` (P,).

    With `failure` the upper end holds with probability 1 - failure over a uniform start, and the run
    goes on until it is within 5 % of the value. Source: Theorem (thm:lanczos).
    """

    def upper(ritz):
        if failure is None:
            return torch.full_like(ritz.value, torch.nan)
        return _certified(ritz, ritz.steps, len(start), failure)

    def done(ritz, j):
        settled = (ritz.residual <= tolerance * ritz.value) & (ritz.steps >= 8)
        return settled if failure is None else settled & (upper(ritz) <= 1.05 * ritz.value)

    ritz = lanczos(lambda v, rows: product(v[0])[None], start[None], max_steps=max_steps, done=done)
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
    **options,
) -> NormEstimate:
    """Spectral norm of the Hessian H_k of the mean loss over the k samples given.

    estimator "lanczos": random start, until the residual is `tolerance` of the value; with `certify`
    the upper end of Theorem (thm:lanczos) at the steps spent. "pyhessian": PyHessian's power iteration
    at its defaults, with a residual computed here, since it reports none. "exact": a dense
    eigenvalue decomposition (P products, P x P memory; float64 rounding only).
    """
    losses = Losses(model, x, y, loss, **options)
    if estimator == "exact":
        H = dense_hessian(model, x, y, loss, **options)
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        top = int(values.abs().argmax())
        value, v = values[top].abs().item(), vectors[:, top]
        residual = (losses.product(v) - values[top] * v).norm().item()
        return NormEstimate(value, value - residual, value + residual, residual, losses.P, True)
    if estimator == "pyhessian":
        return _pyhessian(losses, tolerance, seed)
    if estimator != "lanczos":
        raise ValueError(f"estimator is {estimator!r}: choose lanczos, pyhessian or exact.")
    return operator_norm(
        losses.product,
        _start((losses.P,), losses, seed),
        tolerance=tolerance,
        max_steps=max_steps,
        failure=1 - confidence if certify else None,
    )


def _pyhessian(losses: Losses, tolerance: float, seed: int) -> NormEstimate:
    """PyHessian 0.1 at its defaults (maxIter 100, tol 1e-3), with the products counted and the residual added.

    Its start vectors take torch's default dtype and global generator, and it builds its graph with
    `backward(create_graph=True)`: the default dtype and the generator are set aside meanwhile, and
    `.grad` of the copy is cleared before and after, or a second run would add to the first one's.
    """
    internals = importlib.import_module("pyhessian.hessian")  # the package's attribute is the class

    if len(losses.point) != len(list(losses.model.parameters())):
        raise ValueError("PyHessian takes all parameters: leave `parameters` out or choose the estimator lanczos.")
    losses.model.zero_grad(set_to_none=True)
    default = torch.get_default_dtype()
    calls = 0

    def counted(products):
        def call(*arguments):
            nonlocal calls
            calls += 1
            return products(*arguments)

        return call

    original = internals.hessian_vector_product
    try:
        torch.set_default_dtype(losses.w.dtype)
        internals.hessian_vector_product = counted(original)
        with torch.random.fork_rng(), second_order_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # create_graph leaks until .grad is cleared, which is done below
            torch.manual_seed(seed)
            mean_loss = lambda f, y: loss_from_logits(f, y, losses.loss).mean()  # noqa: E731
            estimator = internals.hessian(
                _Logits(losses.model), mean_loss, data=(losses.x, losses.y), cuda=losses.x.device.type == "cuda"
            )
            (value,), (vector,) = estimator.eigenvalues()
    finally:
        torch.set_default_dtype(default)
        internals.hessian_vector_product = original
        losses.model.zero_grad(set_to_none=True)
    v = torch.cat([p.detach().reshape(-1) for p in vector])
    v = v / v.norm()
    Hv = losses.product(v)
    theta = (v @ Hv).item()
    residual = (Hv - theta * v).norm().item()
    return NormEstimate(abs(value), abs(theta), math.nan, residual, calls, residual <= tolerance * abs(theta))


@dataclass(frozen=True)
class DifferenceNorms:
    """‖H_{k+1} - H_k‖ (`step`) and ‖H_k - H_n‖ (`limit`) for each k of `sizes`: NormEstimates by position."""

    sizes: list[int]
    step: list[NormEstimate]
    limit: list[NormEstimate]


def hessian_difference_norms(
    model, x, y, sizes, order=None, loss="cross_entropy", *, tolerance=1e-3, max_steps=60, seed=0, **options
) -> DifferenceNorms:
    """Norms of the exact differences H_{k+1} - H_k = (h_{k+1} - H_k)/(k+1) and H_k - H_n, never of a subsample.

    `order` (n,) is the order in which samples arrive. k < n. Cost of one size: 10 to 20 products over k
    samples for the step and over n for the limit (H_k - H_n = (1 - k/n)(H_k - mean of the rest)).
    """
    losses = Losses(model, x, y, loss, **options)
    order = torch.arange(losses.n) if order is None else torch.as_tensor(order)
    order, n = order.to(losses.x.device), losses.n
    if not all(1 <= k < n for k in sizes):
        raise ValueError(f"sizes {list(sizes)} have to lie between 1 and n - 1 = {n - 1}: choose such k.")
    start = _start((losses.P,), losses, seed)
    step, limit = [], []
    for k in sizes:
        first, rest = order[:k], order[k:]
        step.append(
            operator_norm(
                lambda v, a=first, b=order[k : k + 1], k=k: (
                    (losses.product(v, rows=b) - losses.product(v, rows=a)) / (k + 1)
                ),
                start,
                tolerance=tolerance,
                max_steps=max_steps,
            )
        )
        limit.append(
            operator_norm(
                lambda v, a=first, b=rest, k=k: (1 - k / n) * (losses.product(v, rows=a) - losses.product(v, rows=b)),
                start,
                tolerance=tolerance,
                max_steps=max_steps,
            )
        )
    return DifferenceNorms(list(sizes), step, limit)


def hessian_trace(model, x, y, loss="cross_entropy", *, probes=32, seed=0, **options) -> tuple[float, float]:
    """Hutchinson's estimate of the trace of H_k, and its standard error over `probes` Rademacher vectors.

    Source: Hutchinson (1990). Unlike PyHessian's, the number of probes is fixed beforehand: a stopping
    rule on the running mean biases the estimate.
    """
    losses = Losses(model, x, y, loss, **options)
    signs = torch.sign(_start((probes, losses.P), losses, seed))
    values = torch.stack([v @ losses.product(v) for v in signs])
    return values.mean().item(), (values.std() / math.sqrt(probes)).item()
