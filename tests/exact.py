"""Exact derivatives to compare with, in float64: double backward through `torch.autograd` with
torch's own losses, of which nothing of `utils` is part; and the dense Hessians of a tape."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.calculus import Tape, read_chain
from utils.calculus.checks import asymmetry, check_outputs

F64 = torch.float64
TIGHT = 1e-10


def output(model, x):
    """The logits (n, ...) of a model that returns them, or an object with `.logits`."""
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def losses_of(model, x, y, loss="cross_entropy"):
    """Losses (n,); those of several tokens are averaged over the ones with a label."""
    f = output(model, x)
    if loss == "mse":
        target = y if y.is_floating_point() else F.one_hot(y, f.shape[-1]).to(f)
        return F.mse_loss(f, target, reduction="none").flatten(1).mean(1)
    if y.ndim == 1:
        return F.cross_entropy(f, y, reduction="none")
    return torch.stack([F.cross_entropy(tokens, targets) for tokens, targets in zip(f, y)])


def reference(model, x, y, loss="cross_entropy", names=None):
    """Value, gradient (P,) and Hessian (P, P) of the mean loss, in the parameters of `names`."""
    leaves = [p for n, p in model.named_parameters() if names is None or n in names]
    frozen = [p.requires_grad_() for p in leaves if not p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        value = losses_of(model, x, y, loss).mean()
        parts = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        gradient = flattened(parts)
        hessian = second(gradient, leaves)
    for p in frozen:
        p.requires_grad_(False)
    return value.detach(), gradient.detach(), hessian


def second(gradient, leaves):
    """The derivative (P, P) of a gradient (P,): all rows at once where vmap knows the operators."""
    options = dict(retain_graph=True, materialize_grads=True)
    try:
        units = torch.eye(len(gradient), dtype=F64)
        rows = torch.autograd.grad(gradient, leaves, units, is_grads_batched=True, **options)
        return torch.cat([part.reshape(len(gradient), -1) for part in rows], 1)
    except RuntimeError:  # an operator's second derivative has no rule, or the entry is constant
        return torch.stack([flattened(torch.autograd.grad(g, leaves, **options)) for g in gradient])


def flattened(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def per_example(model, x, y, loss="cross_entropy", names=None):
    """Gradients (n, P) and Hessians (n, P, P)."""
    each = [reference(model, x[i : i + 1], y[i : i + 1], loss, names)[1:] for i in range(len(x))]
    gradients, hessians = zip(*each)
    return torch.stack(gradients), torch.stack(hessians)


def sample_hessians(model, x, y, loss="cross_entropy"):
    """Hessians (n, P, P) of the examples."""
    return per_example(model, x, y, loss)[1]


def norms_of(matrices):
    """Spectral norms of symmetric matrices (..., P, P)."""
    return torch.linalg.eigvalsh((matrices + matrices.mT) / 2).abs().amax(-1)


def exact_norms(model, x, y, loss="cross_entropy"):
    """Spectral norms (n,) of the Hessians of the examples."""
    return norms_of(sample_hessians(model, x, y, loss))


def close(a, b, tolerance=TIGHT):
    """Largest difference within `tolerance` of the largest entry of b."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def near(a, b, tolerance=TIGHT):
    """The difference's norm within `tolerance` of that of b."""
    assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


# --- the same from a tape ---------------------------------------------------------------------


def tape_of(model, x, y, names=None, chain=None, **options):
    point = {k: t.detach() for k, t in (*model.named_parameters(), *model.named_buffers())}
    names = [k for k, _ in model.named_parameters()] if names is None else names
    chain = read_chain(model, x) if chain is None else chain
    return Tape(chain, point, x, y, moving=names, **options)


def flat(tape, parts, lead):
    """Tangents by name as rows (lead, P)."""
    full = [
        torch.zeros(lead, *tape.values[k].shape[1:], dtype=F64) if t is None else t
        for k, t in parts.items()
    ]
    return torch.cat([t.reshape(lead, -1) for t in full], 1)


def named(tape, V):
    """Rows V (m, P) as tangents by name (m, ...)."""
    shapes = [tape.values[k].shape[1:] for k in tape.moving]
    parts = V.split([s.numel() for s in shapes], 1)
    return {
        k: part.reshape(len(V), *s) for k, part, s in zip(tape.moving, parts, shapes, strict=True)
    }


def dense(model, x, y, names=None, chain=None):
    """Hessians (n, P, P): all unit vectors of one example in one product."""
    matrices = []
    for i in range(len(x)):
        tape = tape_of(model, x[i : i + 1], y[i : i + 1], names, chain)
        units = torch.eye(sum(tape.values[k].numel() for k in tape.moving), dtype=F64)
        matrices.append(flat(tape, tape.product(named(tape, units)), len(units)))
    return torch.stack(matrices)


def assert_exact(model, x, y, names=None):
    """Gradients, dense Hessians, products of a batch, and weighted sums over it; returns the
    batch's tape."""
    names = [k for k, _ in model.named_parameters()] if names is None else names
    tape = tape_of(model, x, y, names)
    check_outputs(tape, output(model, x).detach())
    gradients, matrices = per_example(model, x, y, names=names)
    near(flat(tape, tape.gradient(), len(x)), gradients)
    near(dense(model, x, y, names, tape.chain), matrices)
    V = torch.randn(gradients.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    near(flat(tape, tape.product(named(tape, V)), len(x)), (matrices @ V[..., None])[..., 0])
    weights = torch.tensor([0.2, -1.0, 3.0], dtype=F64)
    summed = tape_of(model, x, y, names, tape.chain, sums=True, weights=weights)
    product = summed.product({k: t[0] for k, t in named(tape, V[:1]).items()})
    product = {k: None if t is None else t[None] for k, t in product.items()}
    near(flat(summed, product, 1)[0], torch.einsum("n,nij,j->i", weights, matrices, V[0]))
    total = {k: None if t is None else t[None] for k, t in summed.gradient().items()}
    near(flat(summed, total, 1)[0], weights @ gradients)
    assert asymmetry(tape) < 1e-12
    return tape
