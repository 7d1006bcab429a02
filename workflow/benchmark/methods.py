"""The methods of each task, ours and those beside it, and the truth they are held to."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from pyhessian import hessian
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from utils.hessian import (
    Losses,
    hessian_norm,
    per_sample_hessian_norms,
    per_sample_losses,
    spectral_density,
)
from utils.hessian.lanczos import lanczos
from utils.hessian.losses import MEMORY, SampleHessians
from utils.hessian.pyhessian import density
from utils.hessian.spectrum import SpectralDensity
from utils.networks import ViT
from utils.networks.copies import prepared_copy
from utils.surface import identities, random_orders
from workflow.benchmark.settings import BASES, Method, Sizes, say


class Plain(ViT):
    """The same network, unknown to the calculus, which takes the exact type only: what any module
    of a user gets."""


def plain(net: ViT) -> Plain:
    twin = copy.deepcopy(net)
    twin.__class__ = Plain
    return twin


def ours(net, x, y, dtype=torch.float64, **options):
    """curvature.per_sample_hessian_norms as a method."""

    def call(rows):
        found = per_sample_hessian_norms(net, x[rows], y[rows], dtype=dtype, **options)
        return found.value, found.converged

    return call


def pyhessian(
    net, x, y, dtype=torch.float64, *, each: bool, batch: int | None = None, tol=1e-3, steps=100
):
    """PyHessian's power iteration alone: one sample after the other, the whole batch, or a data
    loader.

    Its start vectors take torch's default dtype; .grad is cleared, or a second run would add to the
    first one's."""
    net, x, mean = prepared_copy(net, dtype), x.to(dtype), nn.CrossEntropyLoss()

    def one(rows):
        net.zero_grad(set_to_none=True)
        loader = batch and DataLoader(TensorDataset(x[rows], y[rows]), batch_size=batch)
        about = {"dataloader": loader} if loader else {"data": (x[rows], y[rows])}
        return abs(
            hessian(net, mean, cuda=x.is_cuda, **about).eigenvalues(maxIter=steps, tol=tol)[0][0]
        )

    def call(rows):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return [one(r) for r in (rows.split(1) if each else [rows])], None
        finally:
            torch.set_default_dtype(default)

    return call


def arpack(operator) -> tuple[float, bool]:
    """|largest eigenvalue| by SciPy's eigsh, at the tolerance that is our default, and whether it
    converged."""
    try:
        return abs(eigsh(operator, k=1, which="LM", tol=1e-4, return_eigenvectors=False)[0]), True
    except ArpackNoConvergence:
        return math.nan, False


def arpack_of_ours(net, x, y):
    """eigsh on our product with the Hessian of one sample."""

    def one(losses, i):
        product, local = SampleHessians(losses, torch.tensor([i])), torch.tensor([0])

        def matvec(v):
            return product(torch.from_numpy(v.reshape(1, -1).copy()), local)[0].numpy()

        return arpack(LinearOperator((losses.P, losses.P), matvec, dtype=np.float64))

    def call(rows):
        losses = Losses(net, x[rows], y[rows])
        return tuple(zip(*(one(losses, i) for i in range(len(rows)))))

    return call


def curvlinops(net, x, y, *, each: bool, batch: int = 1):
    """eigsh on the Hessian of curvlinops, its checks of determinism switched off; None where it is
    not installed."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError as error:
        say(f"curvlinops is left out ({error}): requirements-benchmark.txt installs it.")
        return None
    net, mean = prepared_copy(net), nn.CrossEntropyLoss()

    def one(rows):
        parts = [(x[r], y[r]) for r in rows.split(batch)]
        about = {"check_deterministic": False, "num_data": len(rows)}
        operator = HessianLinearOperator(net, mean, list(net.parameters()), parts, **about)
        return arpack(operator.to_scipy(dtype=np.float64))

    return lambda rows: tuple(zip(*(one(r) for r in (rows.split(1) if each else [rows]))))


# ----------------------------------------


def sample_norms(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """Spectral norms of the Hessians h_i of single samples.

    The truth takes another road: products by jvp(grad), a random start, every step orthogonalised,
    a residual of 1e-10; where a start at the gradient ends higher, that. Both are Rayleigh
    quotients, that is lower ends."""
    losses, truth, generator = (
        Losses(plain(net), x, y),
        [],
        torch.Generator().manual_seed(1),
    )

    def done(ritz, step):
        near = 1e-10 * ritz.value
        return (
            (ritz.residual <= near)
            & ((ritz.opposite <= ritz.value) | (ritz.other <= near))
            & (step >= 8)
        )

    for rows in torch.arange(len(x)).split(max(1, MEMORY // (800 * losses.P))):
        start = torch.randn(len(rows), losses.P, dtype=torch.float64, generator=generator)
        product, start = SampleHessians(losses, rows), start.to(x.device)
        truth.append(lanczos(product, start, max_steps=200, done=done).value.cpu())
    again = per_sample_hessian_norms(plain(net), x, y, tolerance=1e-8).value
    single, share = torch.float32, sizes.share
    methods = [
        Method("ours", ours(net, x, y)),
        Method("ours, any module", ours(plain(net), x, y)),
        Method("ours, certified", ours(net, x, y, certify=True), share=3 * share),
        Method(BASES["norms"][0], pyhessian(net, x, y, each=True), share=share, chunk=1),
        Method(
            BASES["norms"][1],
            pyhessian(net, x, y, each=True, tol=1e-6, steps=1000),
            share=sizes.few,
            chunk=1,
        ),
        Method("eigsh on our product", arpack_of_ours(net, x, y), share=share, chunk=1),
        Method("eigsh on curvlinops", curvlinops(net, x, y, each=True), share=sizes.few, chunk=1),
        Method("ours", ours(net, x, y, single), single),
        Method("ours, any module", ours(plain(net), x, y, single), single),
        Method(BASES["norms"][0], pyhessian(net, x, y, single, each=True), single, share, 1),
        Method(
            BASES["norms"][1],
            pyhessian(net, x, y, single, each=True, tol=1e-6, steps=1000),
            single,
            sizes.few,
            1,
        ),
    ]
    return methods, torch.maximum(torch.cat(truth), again)


def full_norm(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """Spectral norm of H_k; the truth by jvp(grad), from another start, to a residual of 1e-7."""

    def lanczos(rows):
        found = hessian_norm(net, x[rows], y[rows])
        return [found.value], [found.converged]

    methods = [
        Method("ours", lanczos),
        Method(BASES["norm"][1], pyhessian(net, x, y, each=False), chunk=len(x)),
        Method(BASES["norm"][0], pyhessian(net, x, y, each=False, batch=128), chunk=128),
        Method("eigsh on curvlinops", curvlinops(net, x, y, each=False, batch=128), chunk=128),
    ]
    truth = hessian_norm(plain(net), x, y, tolerance=1e-7, max_steps=300, seed=1).value
    return methods, torch.tensor([truth], dtype=torch.float64)


def spectrum(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """Spectral density of H_n; the values are its moments tr H and tr H^2, the truth those of many
    more probes."""
    options = {"probes": sizes.probes, "steps": sizes.steps}

    def moments(found):
        return [found.moment(1)[0], found.moment(2)[0]], None

    def adapted(rows):
        losses = Losses(net, x[rows], y[rows])
        return moments(SpectralDensity(*density(losses, **options), losses.P))

    methods = [
        Method(
            "ours",
            lambda rows: moments(spectral_density(net, x[rows], y[rows], **options)),
        ),
        Method(BASES["density"][0], adapted, chunk=len(x)),
    ]
    losses, generator = Losses(net, x, y), torch.Generator().manual_seed(1)
    signs = (
        torch.randint(2, (8 if sizes.quick else 128, losses.P), generator=generator).to(losses.w)
        * 2
        - 1
    )
    product = losses.hessian()
    pairs = [(v @ z, z @ z) for v in signs for z in [product(v)]]
    return methods, torch.tensor(pairs, dtype=torch.float64).mean(0)


def loss_steps(net: ViT, x: Tensor, y: Tensor, sizes: Sizes) -> tuple[list[Method], Tensor]:
    """All L_{k+1} - L_k in random orders; the truth in extended precision from losses taken one by
    one."""
    twin, criterion = prepared_copy(net), nn.CrossEntropyLoss(reduction="none")

    def orders(rows):
        return random_orders(len(rows), sizes.orders)

    @torch.no_grad()
    def forward(rows, size):
        return np.concatenate([criterion(twin(x[r]), y[r]).cpu().numpy() for r in rows.split(size)])

    def running(values, orders):
        steps = []
        for order in orders:
            mean = values[order[0]]
            for k, i in enumerate(order[1:], 2):
                before, mean = mean, mean + (values[i] - mean) / k
                steps.append(mean - before)
        return steps, None

    def anew(values, orders):
        means = [[values[order[:k]].mean() for k in range(1, len(order) + 1)] for order in orders]
        return np.diff(means), None

    def vectorised(rows):
        return identities.loss_steps(per_sample_losses(net, x[rows], y[rows]), orders(rows)), None

    methods = [
        Method("ours", vectorised, chunk=len(x)),
        Method(BASES["losses"][0], lambda rows: running(forward(rows, 1), orders(rows)), chunk=1),
        Method(
            "one pass, running means",
            lambda rows: running(forward(rows, len(rows)), orders(rows)),
            chunk=len(x),
        ),
        Method(
            BASES["losses"][1],
            lambda rows: anew(forward(rows, len(rows)), orders(rows)),
            chunk=len(x),
        ),
    ]
    ordered, k = (
        forward(torch.arange(len(x)), 1).astype(np.longdouble)[orders(x)],
        np.arange(1, len(x)),
    )
    truth = (ordered[:, 1:] - np.cumsum(ordered, 1)[:, :-1] / k) / (k + 1)
    return methods, torch.from_numpy(truth.astype(np.float64))


METHODS = {"norms": sample_norms, "norm": full_norm, "density": spectrum, "losses": loss_steps}
