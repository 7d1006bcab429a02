"""The synthetic population: its teacher is the posterior, its draws are fresh."""

import torch
from tiny_files import check_form

from utils.data import load_dataset, synthetic, synthetic_draw, synthetic_teacher


def test_synthetic_teacher_is_the_posterior_of_the_population():
    """p(y | x) by Bayes' rule from the densities, and calibration of the teacher on fresh draws."""
    x, y = synthetic_draw(40_000, seed=0)
    p = synthetic_teacher(x).softmax(1)
    means = torch.from_numpy(synthetic.class_means()).flatten(1)
    density = torch.distributions.Normal(means[None, :20], synthetic.NOISE)
    log_density = density.log_prob(x[:500, None].flatten(2).double()).sum(2)
    torch.testing.assert_close(p[:500], log_density.softmax(1))
    error = (p - torch.nn.functional.one_hot(y, p.shape[1])).mean(0)
    assert error.abs().max() < 5 * 0.5 / len(y) ** 0.5
    fraction = p.gather(
        1, y[:, None]
    ).mean()  # E p_y = E sum_k p_k^2 where the labels follow the teacher
    assert abs(fraction - p.square().sum(1).mean()) < 5 * 0.5 / len(y) ** 0.5


def test_synthetic_draws_are_fresh_and_sized():
    dataset = load_dataset("synthetic", seed=5, n_samples=500)
    check_form(dataset)
    assert sum(dataset.info["sizes"].values()) == 500
    x, _ = synthetic_draw(500, seed=5)
    assert not set(map(bytes, x.numpy())) & set(map(bytes, dataset.x_train.numpy()))
    assert torch.equal(x, synthetic_draw(500, seed=5)[0])
    assert not torch.equal(x, synthetic_draw(500, seed=6)[0])
