"""Exact Hessians by double backward, small networks, and those that every rung is asked about."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.networks import build_model
from utils.networks.contract import second_order_mode
from utils.networks.losses import logits

F64 = torch.float64


def randomised(model: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Every weight random, of size `scale` over the root of its inputs; gains about 1."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(F64).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p.shape[-1] if p.ndim == 2 and name != "pos" else 1
            noise = torch.randn(p.shape, generator=generator, dtype=F64)
            gain = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            p.copy_(scale * noise / math.sqrt(fan_in) + gain)
    return model


def small_vit(seed: int, scale: float = 1.0, **sizes) -> nn.Module:
    """A ViT on 4 x 4 images."""
    defaults = dict(image_size=4, channels=1, patch_size=2, n_classes=3)
    defaults |= dict(depth=1, n_heads=2, d_model=4, d_ff=4, eps=1e-2)
    return randomised(build_model("vit", **(defaults | sizes)), seed, scale)


def small_mlp(seed: int, scale: float = 1.0, **sizes) -> nn.Module:
    """A fully connected network on 16 numbers."""
    defaults = dict(d_in=16, width=4, depth=1, n_classes=3, activation="gelu", bias=True)
    return randomised(build_model("mlp", **(defaults | sizes)), seed, scale)


def images(seed: int, n: int = 2) -> tuple[Tensor, Tensor]:
    """Random images (n, 1, 4, 4) of different size, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(n, 1, 1, 1, generator=generator, dtype=F64)
    x = x * torch.randn(n, 1, 4, 4, generator=generator, dtype=F64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def loss_of(model: nn.Module, loss: str, x: Tensor, y: Tensor, tensors: dict) -> Tensor:
    """The loss of one example at other weights."""
    f = functional_call(Output(model), {f"net.{k}": t for k, t in tensors.items()}, (x[None],))
    if loss == "mse":
        target = nn.functional.one_hot(y[None], f.shape[-1]) if not y.is_floating_point() else y
        return (f - target).square().mean()
    return nn.functional.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1))


class Output(nn.Module):
    """The network's logits as one tensor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.net, x)


def exact_hessian(
    model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy", step: dict | None = None
) -> Tensor:
    """The dense Hessian (P, P) of one example's loss by double backward, weights moved by
    `step`."""
    names = [name for name, _ in model.named_parameters()]
    point = tuple(
        (p.detach() + (0 if step is None else step[name])).requires_grad_()
        for name, p in model.named_parameters()
    )
    with second_order_mode():
        value = loss_of(model, loss, x, y, dict(zip(names, point)))
        first = torch.autograd.grad(value, point, create_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(first, point)
            ]
        )
        units = torch.eye(len(flat), dtype=F64)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):  # no rule for batches
            rows = [torch.autograd.grad(flat, point, unit, **options) for unit in units]
            return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).detach()
        second = torch.autograd.grad(flat, point, units, is_grads_batched=True, **options)
    return torch.cat([part.flatten(1) for part in second], 1).detach()


def exact_norms(model: nn.Module, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> Tensor:
    """Spectral norms (n,) of the dense Hessians."""
    norms = [torch.linalg.matrix_norm(exact_hessian(model, *pair, loss), 2) for pair in zip(x, y)]
    return torch.stack(norms)


class Heads(nn.Module):
    """nn.MultiheadAttention with a causal mask, read at its last token."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.triu(torch.ones(4, 4, dtype=torch.bool), 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).unflatten(1, (4, 4))
        mixed, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        return self.head(mixed[:, -1])


def encoder(norm_first: bool) -> nn.Module:
    """One layer of nn.TransformerEncoder between linear maps."""
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    return nn.Sequential(
        nn.Flatten(),
        nn.Unflatten(1, (4, 4)),
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def convolutional() -> nn.Module:
    """Two convolutions with GroupNorm and tanh between them."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


NETWORKS = {
    "pre cls gelu": lambda: small_vit(1, depth=2, d_ff=5),
    "pre mean gelu_tanh": lambda: small_vit(2, pool="mean", activation="gelu_tanh", n_heads=1),
    "post cls relu": lambda: small_vit(3, norm="post", activation="relu", depth=2),
    "post mean gelu": lambda: small_vit(4, norm="post", pool="mean"),
    "no block": lambda: small_vit(5, depth=0),
    "mlp": lambda: small_mlp(6, depth=2),
    "mlp relu without bias": lambda: small_mlp(7, activation="relu", bias=False),
    "encoder pre": lambda: randomised(encoder(True), 8),
    "encoder post": lambda: randomised(encoder(False), 9),
    "heads with a mask": lambda: randomised(Heads(), 10),
    "convolutions": lambda: randomised(convolutional(), 11, 0.7),
}


def flat_weights(model: nn.Module) -> Tensor:
    """All parameters as one vector (P,)."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_name(model: nn.Module, w: Tensor) -> dict[str, Tensor]:
    """A vector (P,) as tensors by name."""
    parts = w.split([p.numel() for p in model.parameters()])
    named = zip(model.named_parameters(), parts, strict=True)
    return {name: part.view(p.shape) for (name, p), part in named}


def columns(model: nn.Module, groups: list[str]) -> list[Tensor]:
    """The coordinates of the flat vector that belong to each group."""
    places = {group: [] for group in groups}
    start = 0
    for name, p in model.named_parameters():
        owner = name.rsplit(".", 1)[0]
        if owner in places:
            places[owner] += range(start, start + p.numel())
        start += p.numel()
    return [torch.tensor(places[group]) for group in groups]


def norm2(M: Tensor) -> float:
    """The spectral norm of a matrix, 0 of an empty one."""
    return float(torch.linalg.matrix_norm(M, 2)) if M.numel() else 0.0


def bilinear_norm(T: Tensor, rounds: int = 6) -> float:
    """A lower estimate of max |T(u, v)| over unit u, v, for T (z, p, q), by alternating
    maximisation."""
    if float(T.abs().max()) == 0:
        return 0.0
    best = 0.0
    energy = T.square().sum((0, 2))
    for start in (energy.argmax(), energy.argmin()):
        u = torch.full((T.shape[1],), 1e-3, dtype=T.dtype)
        u[start] = 1.0
        for _ in range(rounds):
            along = torch.einsum("zpq,p->zq", T, u / u.norm())
            v = torch.linalg.svd(along, full_matrices=False).Vh[0]
            _, S, Vh = torch.linalg.svd(torch.einsum("zpq,q->zp", T, v), full_matrices=False)
            u = Vh[0]
            best = max(best, float(S[0]))
    return best


def chain_values(chain, model: nn.Module, w: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Every value of the chain for one example at the flat weights w, by name."""
    values = {name: t[None] for name, t in by_name(model, w).items()}
    values |= {name: t[None] for name, t in model.named_buffers()}
    for name, t in chain.constants.items():
        real = t.is_floating_point() or (name.startswith("number ") and t.dtype != torch.bool)
        values[name] = t.to(w) if real else t
    values[chain.input] = x[None, None]
    for step in chain.steps:
        values[step.output] = step.node.forward(*(values[name] for name in step.inputs))[0]
    return {step.output: values[step.output] for step in chain.steps}
