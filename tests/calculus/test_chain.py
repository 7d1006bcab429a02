"""Chains read off networks of every kind: dense Hessians against double backward in float64, and
what is refused."""

import pytest
import torch
import torch.nn.functional as F
from exact import assert_exact, flat, named, near, tape_of
from networks import NETWORKS, images, randomised, tiny_encoder, tiny_vit
from torch import nn

from utils.calculus import Untraceable, read_chain
from utils.calculus.checks import asymmetry, check_outputs, symmetric

F64 = torch.float64
n = 3
K = 3
LABELS = torch.tensor([0, 2, 1])
GENERATOR = torch.Generator().manual_seed(3)
IMAGES = images(n)
SEQUENCES = torch.randn(n, 5, 4, generator=GENERATOR, dtype=F64)
TOKENS = torch.randint(1, 11, (n, 5), generator=GENERATOR)
NEXT = torch.randint(0, 11, (n, 5), generator=GENERATOR)


class Classifier(nn.Module):
    """The mean over the tokens of a body's output, and a head; `forward` may be given as a function
    of both."""

    def __init__(self, body=None, read=None, **modules):
        super().__init__()
        self.body = body
        self.read = read or (lambda net, x: net.body(x).mean(1))
        self.head = nn.Linear(4, K)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.read(self, x))


def causal():
    def read(net, x):
        return F.scaled_dot_product_attention(net.q(x), net.k(x), x, is_causal=True).mean(1)

    return Classifier(read=read, q=nn.Linear(4, 4), k=nn.Linear(4, 4))


def gated():
    def read(net, x):
        return (F.silu(net.a(x)) * net.b(net.norm(x))).mean(1)

    return Classifier(read=read, a=nn.Linear(4, 4), b=nn.Linear(4, 4), norm=nn.RMSNorm(4, 1e-5))


def odd_operators():
    def read(net, x):
        h = net.a(x)
        spread = h.std(1) + F.normalize(h, dim=-1).sum(1)
        return spread + h.detach().mean(1) + torch.cumsum(h, 1)[:, -1]

    return Classifier(read=read, a=nn.Linear(4, 4))


def in_place():
    def read(net, x):
        h = torch.tanh(net.a(x).mul_(2)).clone()
        h[:, 0] = 0.5
        return h.mean(1)

    return Classifier(read=read, a=nn.Linear(4, 4))


def tied():
    layer = nn.Linear(4, 4)
    return Classifier(nn.Sequential(layer, nn.Tanh(), layer))


class Shifted(nn.Module):
    """Adds a buffer, which another module may own as well."""

    def __init__(self, shift):
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x):
        return x + self.shift


def shared_buffer():
    shift = torch.randn(4, generator=torch.Generator().manual_seed(0))
    return Classifier(nn.Sequential(Shifted(shift), nn.Linear(4, 4), nn.Tanh(), Shifted(shift)))


def embedded():
    return Classifier(nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()))


CASES = {name: (build, IMAGES) for name, build in NETWORKS.items()} | {
    "causal": (causal, SEQUENCES),
    "dropout": (lambda: tiny_encoder(depth=2, dropout=0.1), IMAGES),
    "gated": (gated, SEQUENCES),
    "odd operators": (odd_operators, SEQUENCES),
    "in place": (in_place, SEQUENCES),
    "tied": (tied, SEQUENCES),
    "shared buffer": (shared_buffer, SEQUENCES),
    "embedded": (embedded, TOKENS),
}


@pytest.mark.parametrize("name", CASES)
def test_hessians_are_those_of_double_backward(name):
    build, x = CASES[name]
    assert_exact(randomised(build(), 1), x, LABELS)


@pytest.mark.parametrize("part", ["gauss_newton", "functional"])
def test_parts_of_the_hessian(part):
    """J^T S J from the Jacobian of the outputs, and the rest."""
    model = NETWORKS["pre cls gelu"]()
    tape = tape_of(model, IMAGES, LABELS)
    leaves = list(model.parameters())
    f = model(IMAGES)
    rows = [
        torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        for entry in f.flatten()
    ]
    J = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows]).reshape(n, K, -1)
    p = f.softmax(-1).detach()
    gauss_newton = J.mT @ (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ J
    V = torch.randn(n, J.shape[2], dtype=F64, generator=torch.Generator().manual_seed(0))
    direction = named(tape, V)
    expected = (gauss_newton @ V[..., None])[..., 0]
    if part == "functional":
        expected = flat(tape, tape.product(direction), n) - expected
    near(flat(tape, tape.product(direction, part), n), expected)
    out = {k: torch.full_like(t, 7.0) for k, t in direction.items()}
    tape.product(direction, part, out)
    near(flat(tape, out, n), expected)


@pytest.mark.parametrize(
    "names", [["head.weight", "head.bias"], ["blocks.0.attention.query.weight"], ["cls", "pos"]]
)
def test_some_parameters_are_a_block_of_the_whole(names):
    model = NETWORKS["pre cls gelu"]()
    tape = assert_exact(model, IMAGES, LABELS, names)
    if names == ["head.weight", "head.bias"]:
        assert [step.place for step in tape.active] == [
            "linear of head",
            "cross_entropy of the output",
        ]


def test_one_token_is_computed_where_one_is_read():
    """In the last layer only the first row of queries, MLP and residual reaches the head."""
    body = tiny_encoder(norm_first=True, depth=2).encoder
    model = Classifier(body, read=lambda net, x: net.body(x)[:, 0])
    steps = read_chain(randomised(model), SEQUENCES).steps
    rows = {s.place: s.node.shape for s in steps if hasattr(s.node, "shape")}
    assert rows["linear of body.layers.0.linear1"] == (1, 5, 5)
    assert rows["linear of body.layers.1.linear1"] == (1, 1, 5)


def test_mean_over_tokens_and_targets():
    """Labels for every token, one of which does not count; targets of the output's shape."""
    model = randomised(nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11)))
    y = NEXT.clone()
    y[0, :2] = -100
    tape = tape_of(model, TOKENS, y)
    expected = torch.stack([F.cross_entropy(model(t[None])[0], u) for t, u in zip(TOKENS, y)])
    near(tape.losses, expected.detach(), 1e-14)
    target = torch.randn(n, 5, 11, dtype=F64)
    losses = tape_of(model, TOKENS, target, loss="mse").losses
    near(losses, (model(TOKENS) - target).square().mean((1, 2)).detach(), 1e-14)


def test_a_chain_is_read_once_for_a_structure():
    first = read_chain(tiny_vit(), IMAGES)
    assert read_chain(tiny_vit(1).float().double(), IMAGES) is first
    assert read_chain(tiny_vit(depth=2), IMAGES) is not first
    changed = tiny_vit()
    changed.head.register_forward_hook(lambda module, inputs, out: 3 * out)
    assert read_chain(changed, IMAGES) is not first


def test_gelu_by_tanh_is_known_however_it_is_written():
    def by_hand(net, x):
        z = net.a(x)
        return (0.5 * z * (1 + torch.tanh(0.7978845608028654 * (z + 0.044715 * z**3)))).mean(1)

    def almost(net, x):
        z = net.a(x)
        return (0.5 * z * (1 + torch.tanh(0.7978845608028654 * (z + 0.0447 * z**3)))).mean(1)

    for read, name in ((by_hand, "gelu of the network"), (almost, "tanh")):
        model = Classifier(read=read, a=nn.Linear(4, 4)).double().eval()
        places = [s.place for s in read_chain(model, SEQUENCES).steps]
        assert any(name in place for place in places)
        assert ("gelu of the network" in places) == (read is by_hand)


def test_tied_parameters_are_one():
    model = randomised(tied())
    assert read_chain(model, SEQUENCES).parameters == set(dict(model.named_parameters()))


def no_trace_of_values(net, x):
    return net.a(x).mean(1) if float(x.sum()) > 0 else -net.a(x).mean(1)


REFUSED = {
    "values": (no_trace_of_values, "branches on values"),
    "random": (lambda net, x: F.dropout(net.a(x), 0.5, True).mean(1), "is random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_refused_in_one_sentence(name, capfd):
    read, words = REFUSED[name]
    model = Classifier(read=read, a=nn.Linear(4, 4)).double().eval()
    with pytest.raises(Untraceable, match=words) as error:
        read_chain(model, SEQUENCES)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_coupled_examples_are_noticed():
    model = Classifier(
        read=lambda net, x: net.a(x - x.mean(0, keepdim=True)).mean(1), a=nn.Linear(4, 4)
    )
    model = model.double().eval()
    tape = tape_of(model, SEQUENCES, LABELS)
    with pytest.raises(Untraceable, match="not independent"):
        check_outputs(tape, model(SEQUENCES).detach())


@pytest.mark.parametrize("logit", [370.0, 500.0, 700.0])
def test_tiny_products_are_symmetric_too(logit):
    """The squares of products of well-fitted examples are no numbers of float64."""
    model = Classifier(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))).double().eval()
    with torch.no_grad():
        model.head.bias[0] = logit
    assert symmetric(tape_of(model, SEQUENCES, torch.zeros_like(LABELS)))


def test_a_wrong_derivative_is_not_symmetric():
    """The control of the probe: torch's own Embedding with a padding row that is read has no
    Hessian."""
    model = NETWORKS["pre cls gelu"]()
    tape = tape_of(model, IMAGES, LABELS)
    assert symmetric(tape)
    forms = tape.forms()
    name = next(s.output for s in tape.active if s.place == "gelu of blocks.0.mlp")
    right = forms[name]
    forms[name] = lambda dz, dout: (right(dz, dout)[0] * torch.linspace(0.9, 1.1, 4),)
    assert not symmetric(tape) or asymmetry(tape) < 1e-8
