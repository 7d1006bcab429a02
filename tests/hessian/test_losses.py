"""Which parameters move, memory, counting, what is left alone and what is refused."""

import copy
import math

import pytest
import torch
from exact import F64, close, norms_of, reference
from networks import (
    CASES,
    Call,
    Fused,
    case,
    examples,
    random_vit,
    randomised,
    small_first,
    tiny_vit,
)
from refusal import refused
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from utils.hessian import (
    Losses,
    hessian_block_norms,
    hessian_difference_norms,
    hessian_norm,
    hessian_trace,
    hessian_vector_product,
    per_sample_gradients,
    per_sample_hessian_norms,
    per_sample_losses,
    spectral_density,
)
from utils.hessian.coordinates import select_parameters
from utils.hessian.derivatives import dense_hessian, per_sample_hessian_vector_product
from utils.hessian.operations import operations


@pytest.mark.parametrize("name", small_first(CASES))
def test_operations_are_those_of_torch(name):
    """The counter of torch itself, and twice as many for twice the samples."""
    model, x, y, loss = case(name)
    losses = Losses(model, x, y, loss)
    losses.sample_gradients()  # the size of the activations is found once
    _, ours = operations(losses.sample_gradients)
    with FlopCounterMode(display=False) as counter:
        losses.sample_gradients()
    assert ours == counter.get_total_flops() > 0
    double = Losses(model, torch.cat([x, x]), torch.cat([y, y]), loss)
    double.sample_gradients()
    _, twice = operations(double.sample_gradients)
    assert twice == 2 * ours


def test_parameter_patterns():
    model, x, y, loss = case("two blocks")
    names = [n for n, _ in model.named_parameters()]
    _, g, H = reference(model, x, y, loss)
    owner = torch.cat(
        [torch.full((p.numel(),), i) for i, (_, p) in enumerate(model.named_parameters())]
    )
    for patterns, chosen in (
        (["head.*"], ["head.weight", "head.bias"]),
        (["*.query.*", "pos"], [n for n in names if ".query." in n or n == "pos"]),
        (
            ["head.*", "blocks.1.*"],
            [n for n in names if n.startswith(("head", "blocks.1."))],
        ),  # order: the model's
    ):
        keep = torch.isin(owner, torch.tensor([names.index(n) for n in chosen]))
        options = dict(parameters=patterns)
        close(dense_hessian(model, x, y, loss, **options), H[keep][:, keep])
        close(per_sample_gradients(model, x, y, loss, **options).mean(0), g[keep])
        v = torch.randn(int(keep.sum()), generator=torch.Generator().manual_seed(0), dtype=F64)
        found = hessian_vector_product(model, x, y, v, loss, **options)
        close(found, H[keep][:, keep] @ v)
        assert not found.requires_grad  # no graph through the weights that stand still
        norm = norms_of(H[keep][:, keep])
        assert hessian_norm(model, x, y, loss, **options).value == pytest.approx(
            float(norm), rel=1e-6
        )
    refused(lambda: Losses(model, x, y, parameters=["Head.*"]), "Head", "head.weight")
    losses = Losses(model, x, y, parameters=["head.*"])
    whole = Losses(model, x, y)
    some = whole.moving(["head.*"])  # the same as made anew, and the whole stays whole
    assert torch.equal(some.gradient(), losses.gradient()) and some.P == losses.P < whole.P == len(
        whole.gradient()
    )
    assert list(losses.unflatten(torch.zeros(7, losses.P, dtype=F64))) == [
        "head.weight",
        "head.bias",
    ]
    assert losses.unflatten(torch.zeros(7, losses.P, dtype=F64))["head.weight"].shape == (7, 3, 4)


def test_chunks_follow_the_memory_budget():
    model, x, y, loss = case("pre cls gelu")
    values = []
    for memory in (2**30, 2**20, 1):
        losses = Losses(model, x, y, loss, memory=memory)
        values.append(losses.chunk(24))
        each = 8 * 24 * losses.P
        assert losses.chunk(24) == 1 or losses.chunk(24) * each <= memory
        close(losses.product(losses.w), Losses(model, x, y, loss).product(losses.w), 1e-12)
        close(losses.sample_gradients(), Losses(model, x, y, loss).sample_gradients(), 1e-12)
    assert values[0] > values[1] > values[2] == 1
    assert Losses(model, x, y, loss, chunk_size=7, memory=1).chunk(24) == 7


def test_only_on_a_cpu_has_a_chunk_a_size_of_its_own(monkeypatch):
    """Elsewhere all samples go together, as far as the budget goes; a tensor without storage stands
    for a GPU's.
    """
    model, x, y, loss = case("two blocks")
    x, y = torch.cat([x] * 100), torch.cat([y] * 100)
    roomy, tight = (Losses(model, x, y, loss, memory=memory) for memory in (2**40, 2**22))
    assert roomy.chunk(3) == 64 and roomy.chunk(0, 128) == 128
    scarce = tight.chunk(24)
    monkeypatch.setattr(Losses, "w", roomy.w.to("meta"))
    assert roomy.chunk(3) == roomy.chunk(0, 128) == len(x) > 128
    assert tight.chunk(24) == scarce < 64


@pytest.mark.slow
def test_model_and_generators_are_left_alone():
    model, x, y, loss = case("fused")
    model = model.float().train()
    model.head.weight.requires_grad_(False)
    model.shift.grad = torch.full_like(model.shift, 3.0)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    inputs, v = x.clone(), torch.ones(Losses(model, x, y).P, dtype=F64)
    for call in (
        lambda: per_sample_losses(model, x, y, loss),
        lambda: per_sample_gradients(model, x, y, loss),
        lambda: hessian_vector_product(model, x, y, v, loss),
        lambda: per_sample_hessian_vector_product(model, x, y, v.expand(5, -1), loss),
        lambda: per_sample_hessian_norms(model, x, y, loss, max_steps=9),
        lambda: per_sample_hessian_norms(model, x, y, loss, certify=True, max_steps=9),
        lambda: hessian_norm(model, x, y, loss, max_steps=9),
        lambda: hessian_norm(model, x, y, loss, estimator="pyhessian"),
        lambda: hessian_difference_norms(model, x, y, [2], loss=loss, max_steps=9),
        lambda: hessian_trace(model, x, y, loss, probes=2),
        lambda: hessian_trace(model, x, y, loss, estimator="hutch++", probes=6),
        lambda: spectral_density(model, x, y, loss, probes=2, steps=3),
        lambda: hessian_block_norms(model, x, y, loss, max_steps=2),
    ):
        first, again = call(), call()
        assert repr(first) == repr(again)  # the same seed, the same answer
        assert model.training and all(m.training for m in model.modules())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["shift"]
        assert bool((model.shift.grad == 3).all()) and torch.equal(x, inputs)
        assert all(
            torch.equal(t, before[n]) and t.dtype == torch.float32
            for n, t in model.state_dict().items()
        )
        assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == default
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_frozen_parameters_are_coordinates_like_any_other():
    """The surface is a function of all weights; `parameters` restricts it, requires_grad does
    not."""
    model, x, y, loss = case("mlp")
    frozen = copy.deepcopy(model)
    frozen.layers[0].requires_grad_(False)
    close(dense_hessian(frozen, x, y, loss), dense_hessian(model, x, y, loss))
    found, expected = (per_sample_hessian_norms(m, x, y, loss).value for m in (frozen, model))
    assert torch.equal(found, expected)


def test_parameters_that_the_loss_does_not_use():
    """Zero rows and columns, in both engines: the norm is that of the rest."""
    model, x, y, loss = case("fused")
    norm = per_sample_hessian_norms(model, x, y, loss, tolerance=1e-6).value
    model.idle = nn.Linear(3, 3).double()
    close(per_sample_hessian_norms(model, x, y, loss, tolerance=1e-6).value, norm, 1e-9)
    H = dense_hessian(model, x, y, loss)
    assert not H[-12:].any() and not H[:, -12:].any()
    # the key bias of our own attention has no influence: softmax ignores constants in its rows
    own, x, y, loss = case("post cls relu")
    only = per_sample_hessian_norms(own, x, y, loss, parameters=["*.key.bias"])
    assert (only.value <= 1e-12 * per_sample_hessian_norms(own, x, y, loss).value).all()
    assert per_sample_hessian_norms(model, x, y, parameters=["idle.*"]).value.tolist() == [0.0] * 5


def test_one_class_has_no_curvature():
    x, y = examples(n_classes=1)
    for model in (random_vit(1, n_classes=1), randomised(Fused(1), 1)):
        for certify in (False, True):
            found = per_sample_hessian_norms(model, x, y, certify=certify)
            assert found.value.abs().max() <= 1e-12 and found.converged.all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [tiny_vit, Fused])
def test_weights_that_are_no_numbers_are_refused(make, value):
    model, (x, y) = make().double(), examples()
    with torch.no_grad():
        model.head.weight[0, 0] = value
    for call in (
        lambda: per_sample_losses(model, x, y),
        lambda: per_sample_hessian_norms(model, x, y),
        lambda: hessian_norm(model, x, y),
        lambda: spectral_density(model, x, y),
        lambda: hessian_block_norms(model, x, y),
    ):
        refused(call, "head.weight", "NaN or infinity")


class Wrapped(nn.Module):
    """A linear classifier with something done to its input."""

    def __init__(self, before, after=None):
        super().__init__()
        self.before, self.head, self.after = before, nn.Linear(16, 3), after or nn.Identity()

    def forward(self, x):
        return self.after(self.head(self.before(x.flatten(1))))


@pytest.mark.parametrize(
    "before, after, words",
    [
        (Call(lambda x: x + 0.1 * torch.randn_like(x)), None, ("two outputs",)),
        (Call(lambda x: F.dropout(x, 0.5, training=True)), None, ("two outputs",)),
        (Call(lambda x: x - x.mean(0)), None, ("other examples of its batch",)),
        (Call(lambda x: x * len(x)), None, ("other examples of its batch",)),
        (nn.Identity(), Call(lambda f: f / 0), ("finite",)),
        (nn.Identity(), Call(lambda f: f[:, 0]), ("shape", "logits")),
        (nn.Identity(), Call(lambda f: f[:, None]), ("labels", "(5, 1, 3)")),
    ],
)
def test_random_and_batch_dependent_models_are_refused(before, after, words):
    model, (x, y) = Wrapped(before, after).double(), examples()
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=F64)
    for call in (
        lambda: per_sample_losses(model, x, y),
        lambda: hessian_vector_product(model, x, y, v),
        lambda: per_sample_hessian_norms(model, x, y),
        lambda: hessian_norm(model, x, y, estimator="pyhessian"),
    ):
        refused(call, *words)


def test_arguments_that_make_no_sense():
    model, (x, y) = Wrapped(nn.Dropout(0.0)).double(), examples()
    assert per_sample_losses(model, x, y).shape == (5,)  # dropout that drops nothing is fine
    refused(lambda: per_sample_losses(model, x, y[:3]), "5", "3")
    refused(lambda: per_sample_losses(model, x[:0], y[:0]), "0")
    refused(lambda: per_sample_losses(model, x, y, "hinge"), "hinge")
    assert per_sample_losses(model, x[:1], y[:1]).shape == (1,)
    assert per_sample_hessian_norms(model, x[:1], y[:1]).value.shape == (1,)
    refused(lambda: per_sample_hessian_norms(model, x, y, max_steps=0), "max_steps", "0")
    refused(lambda: hessian_norm(model, x, y, max_steps=0), "max_steps", "0")
    for confidence in (-9.0, 0.0, 1.0, 1.5):
        refused(
            lambda c=confidence: per_sample_hessian_norms(model, x, y, certify=True, confidence=c),
            "confidence",
        )
        refused(
            lambda c=confidence: hessian_norm(model, x, y, certify=True, confidence=c), "confidence"
        )


def test_names_are_taken_literally_before_they_are_patterns():
    names = ["d.[ab].weight", "d.a.weight", "d.b.weight", "d.l?.weight", "d.l1.weight"]
    assert select_parameters(names, ["d.[ab].weight"]) == ["d.[ab].weight"]
    assert select_parameters(names, ["d.l?.weight", "d.b*"]) == ["d.b.weight", "d.l?.weight"]
    assert select_parameters(names, ["d.[ab]*"]) == ["d.a.weight", "d.b.weight"]
    assert select_parameters(names, None) == names
    refused(lambda: select_parameters(names, ["head"]), "head", "d.l1.weight")


def test_arrays_of_numpy_and_lists_are_taken():
    model, (x, y) = Wrapped(nn.Identity()).double(), examples()
    expected = per_sample_losses(model, x, y)
    for labels in (y.numpy(), y.tolist(), y.numpy().astype("uint8"), y.to(torch.int32)):
        assert torch.equal(per_sample_losses(model, x.numpy(), labels), expected)
    refused(lambda: Losses(nn.Flatten(), x, y), "no parameters")


def test_a_parameter_without_axes_is_a_coordinate():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.tensor(0.3)), nn.Linear(16, 3)

        def forward(self, x):
            return self.scale.exp() * self.head(x.flatten(1))

    model, (x, y) = Temperature().double(), examples()
    close(dense_hessian(model, x, y), reference(model, x, y, "cross_entropy")[2])
    assert hessian_norm(model, x, y).converged
