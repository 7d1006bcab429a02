"""Exact derivatives to compare with: dense Hessians by double backward, in float64."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.calculus import Tape, read_chain
from utils.calculus.checks import asymmetry, check_outputs

F64 = torch.float64


def randomised(model, scale=0.3):
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=F64))
    return model


def output(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def double_backward(model, x, y, names):
    """Per-example Hessians (n, P, P) in the named parameters, and gradients (n, P)."""
    leaves = [p for k, p in model.named_parameters() if k in names]
    gradients, hessians = [], []
    for i in range(len(x)):
        with sdpa_kernel(SDPBackend.MATH):
            f = output(model, x[i : i + 1])
        loss = F.cross_entropy(f.reshape(-1, f.shape[-1]), y[i : i + 1].reshape(-1))
        gradient = flattened(
            torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        )
        gradients.append(gradient.detach())
        hessians.append(second(gradient, leaves))
    return torch.stack(gradients), torch.stack(hessians)


def second(gradient, leaves):
    """The derivative (P, P) of a gradient (P,): all rows at once where vmap knows the operators."""
    options = dict(retain_graph=True, materialize_grads=True)
    try:
        units = torch.eye(len(gradient), dtype=F64)
        rows = torch.autograd.grad(gradient, leaves, units, is_grads_batched=True, **options)
        return torch.cat([part.flatten(1) for part in rows], 1)
    except RuntimeError:  # an operator's second derivative has no rule, or the entry is constant
        return torch.stack([flattened(torch.autograd.grad(g, leaves, **options)) for g in gradient])


def flattened(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def tape_of(model, x, y, names=None, chain=None, **options):
    point = {k: t.detach() for k, t in (*model.named_parameters(), *model.named_buffers())}
    names = [k for k, _ in model.named_parameters()] if names is None else names
    chain = read_chain(model, x) if chain is None else chain
    return Tape(chain, point, x, y, moving=names, **options)


def flat(tape, parts, lead):
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


def dense(model, x, y, names, chain=None):
    """Hessians (n, P, P): all unit vectors of one example in one product."""
    hessians = []
    for i in range(len(x)):
        tape = tape_of(model, x[i : i + 1], y[i : i + 1], names, chain)
        units = torch.eye(sum(tape.values[k].numel() for k in names), dtype=F64)
        hessians.append(flat(tape, tape.product(named(tape, units)), len(units)))
    return torch.stack(hessians)


def near(a, b, tolerance=1e-10):
    assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


def assert_exact(model, x, y, names=None):
    """Gradients, dense Hessians, products of a batch, and weighted sums over it; returns the
    batch's tape."""
    names = [k for k, _ in model.named_parameters()] if names is None else names
    tape = tape_of(model, x, y, names)
    check_outputs(tape, output(model, x).detach())
    gradients, hessians = double_backward(model, x, y, names)
    near(flat(tape, tape.gradient(), len(x)), gradients)
    near(dense(model, x, y, names, tape.chain), hessians)
    V = torch.randn(gradients.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    near(flat(tape, tape.product(named(tape, V)), len(x)), (hessians @ V[..., None])[..., 0])
    weights = torch.tensor([0.2, -1.0, 3.0], dtype=F64)
    summed = tape_of(model, x, y, names, tape.chain, sums=True, weights=weights)
    product = summed.product({k: t[0] for k, t in named(tape, V[:1]).items()})
    product = {k: None if t is None else t[None] for k, t in product.items()}
    near(flat(summed, product, 1)[0], torch.einsum("n,nij,j->i", weights, hessians, V[0]))
    total = {k: None if t is None else t[None] for k, t in summed.gradient().items()}
    near(flat(summed, total, 1)[0], weights @ gradients)
    assert asymmetry(tape) < 1e-12
    return tape
