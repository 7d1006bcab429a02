"""Losses, and what a model has to satisfy."""

import numpy as np
import pytest
import torch
from exact import close, exact_norms
from networks import images, randomised, tiny_encoder, tiny_vit
from refusal import refused
from torch import nn
from torch.nn import functional as F

from utils.bounds import RUNGS, hessian_bounds
from utils.hessian import per_sample_hessian_norms, per_sample_losses
from utils.hessian.derivatives import dense_hessian
from utils.networks.contract import admit, refuse_other_training
from utils.networks.copies import prepared_copy, second_order_mode
from utils.networks.labels import as_tensor, fitting_labels
from utils.networks.losses import loss_from_logits
from utils.networks.training import train


def test_losses():
    f = torch.randn(5, 4, dtype=torch.float64)
    f[0] = torch.tensor([1000.0, 0, -1000, 3])
    y = torch.tensor([1, 0, 3, 2, 1])
    torch.testing.assert_close(loss_from_logits(f, y), F.cross_entropy(f, y, reduction="none"))
    target = F.one_hot(y, 4).double()
    torch.testing.assert_close(
        loss_from_logits(f, y, "mse"), F.mse_loss(f, target, reduction="none").mean(1)
    )
    refused(lambda: loss_from_logits(f, y, "hinge"), "hinge")


def test_losses_of_tokens():
    """The mean over an example's tokens, of which some do not count; targets that are numbers."""
    f = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.tensor([[1, -100, 3], [0, 0, 2]])
    expected = torch.stack([F.cross_entropy(a, b) for a, b in zip(f, y)])
    torch.testing.assert_close(loss_from_logits(f, y), expected)
    target = torch.randn(2, 3, 4, dtype=torch.float64)
    squares = (f - target).square().mean((1, 2))
    torch.testing.assert_close(loss_from_logits(f, target, "mse"), squares)


def test_prepared_copy_and_mode():
    model = randomised(tiny_vit()).float().train()
    model.pos.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    twin = prepared_copy(model)
    assert not twin.training and twin.pos.requires_grad and twin.head.weight.grad is None
    assert all(p.dtype == torch.float64 for p in twin.parameters())
    with torch.no_grad():
        twin.pos.zero_()
    assert model.training and not model.pos.requires_grad and model.pos.abs().min() > 0
    assert model.pos.dtype == torch.float32 and bool((model.head.weight.grad == 1).all())
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        with second_order_mode():
            assert not torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(KeyError), second_order_mode():
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    torch.backends.mha.set_fastpath_enabled(True)


class Weighted(nn.Module):
    """A function of the inputs, then a linear map."""

    def __init__(self, function):
        super().__init__()
        self.function, self.head = function, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.function(x.flatten(1)))


def of_output(function):
    """A linear map, then a function of its output."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.register_forward_hook(lambda module, inputs, output: function(output))
    return model


LABELS = torch.tensor([0, 1, 2, 0])


class Counting(nn.Module):
    """Another output at every call."""

    def __init__(self):
        super().__init__()
        self.head, self.calls = nn.Linear(16, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.calls * self.head(x.flatten(1))


REFUSED = {
    "noise": (Weighted(lambda x: x + torch.rand(())), "two outputs"),
    "dropout that is always on": (Weighted(lambda x: F.dropout(x, 0.5, True)), "two outputs"),
    "a counter": (Counting(), "two outputs"),
    "the mean of the batch": (Weighted(lambda x: x - x.mean(0)), "depends on the other"),
    "its largest entry": (Weighted(lambda x: x / x.abs().max()), "depends on the other"),
    "its first example": (Weighted(lambda x: x - x[:1]), "depends on the other"),
    "the examples before": (Weighted(lambda x: x.cumsum(0)), "depends on the other"),
    "the examples after": (Weighted(lambda x: x + x.roll(-1, 0)), "depends on the other"),
    "the size of the batch": (Weighted(lambda x: len(x) * x), "depends on the other"),
    "batch statistics": (Weighted(lambda x: F.batch_norm(x, None, None, training=True)), "fails"),
    "batch normalisation": (nn.Sequential(nn.BatchNorm1d(16).eval()), "0 is batch normalisation"),
    "no class": (of_output(lambda f: f[:, 0]), "(n, classes)"),
    "no number": (of_output(lambda f: f / 0), "no finite number"),
    "a tuple": (of_output(lambda f: (f, f)), "returns a tuple"),
    "nothing": (of_output(lambda f: {"logits": None}), "returns a dict"),
    "integers": (of_output(lambda f: f.long()), "torch.int64"),
    "another size": (nn.Linear(5, 3), "fails on inputs of shape (1, 1, 4, 4)"),
    "a type of its own": (Weighted(lambda x: x.float()), "fails"),
    "the end of Python": (Weighted(lambda x: exit(0)), "SystemExit"),
    "no weights": (nn.Flatten(), "no parameters"),
    "a function": (lambda x: x, "give a torch.nn.Module"),
    "the meta device": (nn.Linear(16, 3, device="meta"), "meta device"),
    "a lazy layer": (nn.LazyLinear(3), "no shape yet"),
    "complex weights": (nn.Linear(16, 3, dtype=torch.complex64), "is complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    model, said = REFUSED[name]
    refused(lambda: admit(model, images(4), LABELS), said)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused():
    model = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    refused(lambda: admit(model, images(4), LABELS), "TorchScript")


@pytest.mark.parametrize("n", [5, 70, 200])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_one_bad_example_is_found_and_named(n, place):
    """NaN in an input, an output that is infinite for one example, a dependence of one on one."""
    bad = int(place * n)
    x, y = images(n), torch.arange(n) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    spoilt = x.clone()
    spoilt[bad, 0, 1, 1] = torch.nan
    refused(lambda: admit(model, spoilt, y), f"Input {bad} ")
    black = x.clone()
    black[bad] = 0
    logarithm = Weighted(lambda x: x.norm(dim=1, keepdim=True).log() + x)
    refused(lambda: admit(logarithm, black, y), f"example {bad} is no finite number")
    mixed = Weighted(lambda x: torch.where(x.norm(dim=1, keepdim=True) == 0, x.mean(0), x))
    refused(lambda: admit(mixed, black, y), f"example {bad} depends on the other")


@pytest.mark.parametrize("build", [tiny_vit, tiny_encoder])
def test_what_is_accepted(build):
    for model in (build(), nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))):
        twin, x, y = admit(model.train(), images(100), torch.arange(100) % 3)
        assert not twin.training and model.training
        assert x.dtype == torch.float64 and y.dtype == torch.int64
    dictionary = of_output(lambda f: {"logits": f})
    assert len(admit(dictionary, images(4), LABELS).x) == 4


def test_inference_mode_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.inference_mode():
        refused(lambda: admit(model, images(4), LABELS), "inference_mode")
    with torch.no_grad():
        assert per_sample_hessian_norms(model, images(4), LABELS).converged.all()


def test_generators_are_left_alone():
    class Seeding(nn.Linear):
        def forward(self, x):
            torch.manual_seed(7)
            return super().forward(x.flatten(1))

    model = Seeding(16, 3)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    admit(model, images(4), LABELS)
    assert torch.equal(torch.rand(2), expected)


def test_what_training_mode_changes_is_refused_in_training():
    class Own(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x.flatten(1)), 0.1, self.training)

    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3))
    for model in (Own(16, 3), dropping):
        refused(lambda m=model: refuse_other_training(m, images(4)), "training mode")
    refuse_other_training(tiny_vit(), images(4))


INTEGERS = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("kind", INTEGERS)
def test_labels_of_every_integer_type(kind):
    labels = np.array([0, 2, 1, 1], dtype=kind)
    for y in (labels, torch.from_numpy(labels), labels.astype(labels.dtype.newbyteorder(">"))):
        found = fitting_labels(as_tensor(y, "y"), (4, 3), "cross_entropy")
        assert found.dtype == torch.int64 and found.tolist() == [0, 2, 1, 1]


WRONG = {
    "0 to K": ([1, 2, 3, 3], "cross_entropy", "from 0 to 2"),
    "-1": ([0, -1, 1, 2], "cross_entropy", "from -1 to 2"),
    "floats": ([0.0, 1.0, 2.0, 0.0], "cross_entropy", "float"),
    "bools": ([True, False, True, True], "cross_entropy", "bool"),
    "a column": ([[0], [1], [2], [0]], "cross_entropy", "(4, 1)"),
    "one-hot": ([[1, 0, 0]] * 4, "cross_entropy", "(4, 3)"),
    "text": (["a", "b", "c", "a"], "cross_entropy", "no array of numbers"),
    "targets of another shape": ([[0.1], [0.2], [0.3], [0.4]], "mse", "(4, 1)"),
    "a target that is no number": ([[0.1, torch.nan, 1.0]] * 4, "mse", "example 0"),
    "too large": (np.array([0, 2**63 + 1, 0, 0], dtype="uint64"), "cross_entropy", "go from"),
    "a token that does not count": ([[0, -100]] * 4, "mse", "from -100"),
    "bce of three": ([0, 1, 0, 1], "bce", "one logit"),
    "another loss": ([0, 1, 2, 0], "hinge", "hinge"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_do_not_fit(name):
    y, loss, said = WRONG[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    if name == "a token that does not count":
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Unflatten(1, (2, 3)))
    refused(lambda: admit(model, images(4), y, loss), said)


def test_masked_and_sparse_arrays_are_refused():
    refused(lambda: as_tensor(np.ma.masked_equal([1, 2], 2), "y"), "masked")
    refused(lambda: as_tensor(torch.eye(2).to_sparse(), "x"), "sparse")


def test_one_logit():
    """bce is cross-entropy of (0, f), and has its derivatives."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = images(4), torch.tensor([0, 1, 1, 0])
    two = of_pair(model)
    close(per_sample_losses(model, x, y, "bce"), per_sample_losses(two, x, y))
    close(dense_hessian(model, x, y, "bce"), dense_hessian(two, x, y))
    exact = exact_norms(two, x, y)
    for rung in RUNGS[1:]:
        bound = hessian_bounds(model, x, y, "bce", rung).values
        assert (bound >= exact * (1 - 1e-9)).all() and (bound < 1e3 * exact).all()
    close(per_sample_losses(model, x, y[:, None], "bce"), per_sample_losses(two, x, y))
    refused(lambda: admit(model, x, y, "mse"), "real targets")
    refused(lambda: admit(model, x, 2 * y, "bce"), "from 0 to 1")
    result = train(model, x.sign(), (x.sum((1, 2, 3)) > 0).long(), loss="bce", epochs=2)
    assert result.history


def of_pair(model):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            f = self.net(x)
            return torch.cat([0 * f, f], 1)

    return Pair()
