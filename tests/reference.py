"""Networks and dense matrices that the tests of this folder measure against.

The reference is double backward through `torch.autograd` with torch's own losses; nothing of
`utils.hessian` is in it.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.networks import build_model

F64 = torch.float64


TIGHT = 1e-10


class Fused(nn.Module):
    """Fused attention and torch's layer norm with an affine weight: what a user's model looks
    like."""

    def __init__(self, d=4, K=3):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(4, d), nn.Linear(d, 3 * d), nn.Linear(d, K)
        self.scale, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.d = d

    def forward(self, x):
        h = self.embed(x.unflatten(-1, (2, 2)).flatten(1).unflatten(1, (4, 4)))  # (B, 4, d)
        z = F.layer_norm(h, (self.d,), self.scale, self.shift)
        q, k, v = (
            self.qkv(z).unflatten(-1, (3, 2, self.d // 2)).permute(2, 0, 3, 1, 4)
        )  # (B, 2, 4, d/2)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.layer_norm(h, (self.d,), self.scale, self.shift).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, whose eval mode takes a fast path without derivatives; an object
    is returned.
    """

    def __init__(self, norm_first):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return SimpleNamespace(
            logits=self.head(self.encoder(x.reshape(len(x), 4, 4))[:, 0]), hidden=None
        )


def vit(**sizes):
    small = dict(
        image_size=4, channels=1, patch_size=2, n_classes=3, depth=1, n_heads=2, d_model=4, d_ff=4
    )
    return build_model("vit", **(small | {"eps": 1e-2} | sizes))


def randomised(model, seed, scale=0.8):
    """Every parameter random: biases and LayerNorm included, so that no term of a derivative is
    zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            offset = 1.0 if ("norm" in name and name.endswith("weight")) or name == "scale" else 0.0
            p.copy_(offset + scale * torch.randn(p.shape, generator=generator, dtype=F64))
    return model


def samples(seed=0, n=5, K=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=F64), torch.randint(
        0, K, (n,), generator=generator
    )


CASES = {
    "vit-pre-cls-gelu-depth2": (lambda: vit(depth=2), "cross_entropy"),
    "vit-pre-mean-relu": (lambda: vit(pool="mean", activation="relu"), "cross_entropy"),
    "vit-post-cls-tanh": (lambda: vit(norm="post", activation="gelu_tanh"), "cross_entropy"),
    "vit-post-mean-gelu-depth2-mse": (lambda: vit(depth=2, norm="post", pool="mean"), "mse"),
    "vit-pre-cls-relu-mse": (lambda: vit(activation="relu"), "mse"),
    "mlp": (
        lambda: build_model("mlp", d_in=16, width=4, depth=1, n_classes=3, activation="gelu"),
        "cross_entropy",
    ),
    "fused": (Fused, "cross_entropy"),
    "fused-mse": (Fused, "mse"),
    "encoder-post": (lambda: Encoder(False), "cross_entropy"),
    "encoder-pre": (lambda: Encoder(True), "cross_entropy"),
}


def case(name, seed=1):
    make, loss = CASES[name]
    return randomised(make(), seed), *samples(seed), loss


def reference_losses(model, x, y, loss):
    """(n,) by torch's own losses."""
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else out.logits
    if loss == "cross_entropy":
        return F.cross_entropy(out, y, reduction="none")
    return F.mse_loss(out, F.one_hot(y, out.shape[-1]).to(out), reduction="none").mean(1)


def reference(model, x, y, loss, names=None):
    """Value, gradient (P,) and Hessian (P, P) of the mean loss by double backward; only the
    parameters in `names`.
    """
    chosen = [p for n, p in model.named_parameters() if names is None or n in names]
    with sdpa_kernel(SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        value = reference_losses(model.eval(), x, y, loss).mean()
        torch.backends.mha.set_fastpath_enabled(True)
        g = torch.cat(
            [t.reshape(-1) for t in torch.autograd.grad(value, chosen, create_graph=True)]
        )
        units = torch.eye(len(g), dtype=g.dtype)
        rows = torch.autograd.grad(g, chosen, units, is_grads_batched=True, materialize_grads=True)
    return value.detach(), g.detach(), torch.cat([t.reshape(len(g), -1) for t in rows], 1)


def sample_hessians(model, x, y, loss="cross_entropy"):
    return torch.stack(
        [reference(model, x[i : i + 1], y[i : i + 1], loss)[2] for i in range(len(x))]
    )


def norms_of(hessians):
    return torch.linalg.eigvalsh((hessians + hessians.mT) / 2).abs().amax(-1)


def close(a, b, tolerance=TIGHT):
    """Largest difference within `tolerance` of the largest entry of b."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


class TwoLinear(nn.Module):
    """W_2 W_1 x with small weights: the Hessian is nearly [[0, C], [C^T, 0]], whose spectrum is
    symmetric about 0.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(x.flatten(1)))


class Hidden(nn.Module):
    """A logit with a gradient along two weights and curvature along others: the gradient never sees
    the norm.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = (
            nn.Parameter(torch.tensor([0.3, 0.2])),
            nn.Parameter(torch.zeros(6)),
        )

    def forward(self, x):
        f = x.flatten(1)[:, :2] @ self.seen + 0.1 * self.seen[1] ** 2
        f = (f + (self.unseen**2 * torch.arange(1.0, 7).to(x)).sum() * 5)[:, None]
        return torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], 1)


class Late(nn.Module):
    """Ends of the spectrum near -1 and 0.98, and a gradient with a share of 1e-4 in the larger one:
    it comes late.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(40))
        self.register_buffer(
            "bend", torch.cat([torch.linspace(-0.3, 0.3, 38), torch.tensor([0.98, -1.0])])
        )
        self.register_buffer("slope", torch.tensor([1e-3] * 39 + [1e-7]))

    def forward(self, x):
        f = (
            2
            + 0.1 * x.flatten(1).mean(1, keepdim=True)
            + self.slope @ self.w
            + self.bend @ self.w**2 / 2
        )
        return torch.cat([f, torch.zeros_like(f), torch.zeros_like(f)], 1)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def diagonal(values):
    values = torch.as_tensor(values, dtype=F64)
    return lambda v, rows, out: v * values


def never(ritz, steps):
    return torch.zeros_like(ritz.value, dtype=torch.bool)
