"""Probes on features that are made up: each is compared with scikit-learn, or with loops in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from models.layers.attentive_pools import POOLS, create_pool
from retinue.probing.attentive import AttentiveClassifier, AttentiveProbe
from retinue.probing.choice import choose, hold_out, predict, standardiser
from retinue.probing.features import Features
from retinue.probing.few_shot import draw_shots, least_squares
from retinue.probing.linear import LinearProbe, LogisticProbe
from retinue.probing.neighbours import NeighbourProbe

K, D = 3, 5


def clusters(images: int, seed: int, spread: float = 1.0, shape: tuple[int, ...] = (D,)) -> Features:
    """Return features around a centre for each class, with scales that differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(images) % K
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(images, *shape, generator=generator)
    centre = centres[label] if len(shape) == 1 else centres[label][:, None]
    values = (centre + spread * noise) * torch.logspace(-1, 1, D) + 3
    return Features(values, label, torch.arange(images))


def test_logistic_regression_is_scikit_learns():
    train, test = clusters(90, 0), clusters(40, 1)
    standardise = standardiser(train.values.double())
    x, y = standardise(train.values.double()).numpy(), train.label.numpy()
    probe = LogisticProbe(K, [0.05, 20.0], max_iterations=500)
    ours = predict(probe.fit(train, probe.settings), test.values).softmax(-1).numpy()
    for strength, probabilities in zip(probe.strengths, ours, strict=True):
        theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(x, y)
        expected = theirs.predict_proba(standardise(test.values.double()).numpy())
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)


def test_sgd_with_many_settings_is_the_loop_over_each_setting():
    train, test = clusters(37, 0), clusters(20, 1)
    probe = LinearProbe(K, [0.3, 2.0], [0.0, 0.1], epochs=3, batch_size=8, seed=4)
    ours = predict(probe.fit(train, probe.settings), test.values)
    standardise = standardiser(train.values.double())
    x, steps = standardise(train.values.double()), 37 // 8
    for scores, (rate, decay) in zip(ours, itertools.product([0.3, 2.0], [0.0, 0.1]), strict=True):
        weight = torch.zeros(D, K, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(K, dtype=torch.float64, requires_grad=True)
        groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
        optimizer = torch.optim.SGD(groups, lr=rate * 8 / 256, momentum=0.9)
        generator = torch.Generator().manual_seed(4)
        for epoch in range(3):
            order = torch.randperm(37, generator=generator)
            for step in range(steps):
                rows = order[step * 8 : step * 8 + 8]
                loss = torch.nn.functional.cross_entropy(x[rows] @ weight + bias, train.label[rows])
                optimizer.zero_grad()
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = rate * 8 / 256 * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (3 * steps)))
                optimizer.step()
        expected = standardise(test.values.double()) @ weight + bias
        torch.testing.assert_close(scores.double(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_neighbours_vote_as_in_a_loop():
    train, test = clusters(60, 0, spread=2.0), clusters(30, 1, spread=2.0)
    probe = NeighbourProbe(K, [1, 7, 20], temperature=0.07)
    ours = predict(probe.fit(train, probe.settings), test.values).exp()
    gallery = train.values.double().numpy()
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    for row, value in enumerate(test.values.double().numpy()):
        similarity = gallery @ value / np.linalg.norm(value)
        nearest = sorted(range(60), key=lambda i: -similarity[i])
        for place, k in enumerate([1, 7, 20]):
            votes = np.zeros(K)
            for i in nearest[:k]:
                votes[train.label[i]] += math.exp(similarity[i] / 0.07)
            np.testing.assert_allclose(ours[place, row].numpy(), votes / votes.sum(), atol=1e-4)


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(ValueError, match="k=100 neighbours are more than the 60 images"):
        NeighbourProbe(K, [10, 100], 0.07).fit(clusters(60, 0), [{"k": 10}, {"k": 100}])


@pytest.mark.parametrize("images", [30, 4])
def test_least_squares_solve_the_regularised_normal_equations(images):
    """With 4 images there are fewer equations than the 6 unknowns of a class."""
    train, test = clusters(images, 0), clusters(20, 1)
    x = train.values.double().numpy()
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = np.hstack([(x - mean) / std, np.full((images, 1), 100.0)])
    target = np.where(np.arange(K) == train.label.numpy()[:, None], 1.0, -1.0)
    weight = np.linalg.inv(x.T @ x + 3.0 * np.eye(D + 1)) @ x.T @ target
    expected = np.hstack([(test.values.double().numpy() - mean) / std, np.full((20, 1), 100.0)]) @ weight
    np.testing.assert_allclose(least_squares(train, K, 3.0, test.values).numpy(), expected, rtol=1e-6, atol=1e-8)


def test_shots_are_drawn_of_each_class_and_more_contain_fewer():
    label = clusters(30, 0).label
    few, many = draw_shots(label, 2, seed=5), draw_shots(label, 6, seed=5)
    assert sorted(label[few].tolist()) == [0, 0, 1, 1, 2, 2] and set(few.tolist()) < set(many.tolist())
    assert set(draw_shots(label, 2, seed=6).tolist()) != set(few.tolist())
    with pytest.raises(ValueError, match=r"probe\.shots=11 is more than the 10 training images of the smallest class"):
        draw_shots(label, 11, seed=0)


def test_each_class_is_held_out_by_its_share_and_no_image_twice():
    label = torch.tensor([0] * 40 + [1] * 5 + [2])
    fit, chosen = hold_out(label, 0.1, seed=0)
    assert torch.bincount(label[chosen]).tolist() == [4, 1] and sorted([*fit.tolist(), *chosen.tolist()]) == list(
        range(46)
    )
    with pytest.raises(ValueError, match="no class of the 3 training images has two"):
        hold_out(torch.arange(3), 0.1, seed=0)


def test_the_setting_is_chosen_on_held_out_images_and_fitted_to_all():
    """A diverging setting is never chosen, and the winner has seen all training images."""
    train = clusters(90, 0)
    seen: list[int] = []

    class Spy(LinearProbe):
        def fit(self, train, settings):
            seen.append(len(train.label))
            scores = super().fit(train, settings)
            return lambda values: scores(values) * torch.tensor([s["learning_rate"] for s in settings])[:, None, None]

    probe = Spy(K, [float("nan"), 1e-9, 1.0], [0.0], epochs=20, batch_size=32, seed=0)
    chosen = choose(probe, train, 0.2, seed=0)
    assert chosen.setting == {"learning_rate": 1.0, "weight_decay": 0.0}
    assert chosen.images == 18 and seen == [72, 90] and len(chosen.trials) == 3
    assert chosen.trials[0]["accuracy"] == 0 and chosen.trials[2]["accuracy"] > 0.7


def test_the_attentive_probe_learns_where_the_class_is():
    """One token of nine shows the class, so the mean of the tokens says little."""
    tokens = [clusters(120, seed, spread=1.0, shape=(9, D)) for seed in (0, 1)]
    for part in tokens:
        part.values[:, 1:] = 0.3 * torch.randn(120, 8, D, generator=torch.Generator().manual_seed(3))
        part.values[:, 0] = 3 * torch.nn.functional.one_hot(part.label, D)
    probe = AttentiveProbe(K, {"name": "ep", "queries": 5}, "adamw", [0.1], 20, 2, 32, 0, torch.device("cpu"))
    first, again = (predict(probe.fit(tokens[0], probe.settings), tokens[1].values)[0] for _ in range(2))
    assert (first.argmax(1) == tokens[1].label).double().mean() > 0.95
    assert torch.equal(first, again)
    factors = [factor for _, factor in probe.steps(120)]
    assert factors[0] == 0 and max(factors) == 1.0 and factors.index(1.0) == 2 * 3 and factors[-1] < 0.02


def test_lars_adapts_matrices_only():
    """One step by hand: matrices move by 0.001 |w| / |gradient| times the rate, biases by the rate."""
    train = clusters(16, 0, shape=(4, D))
    probe = AttentiveProbe(K, {"name": "ep", "queries": 1}, "lars", [2.0], 1, 0, 16, 7, torch.device("cpu"))
    trained = probe.train(train, 2.0)
    torch.manual_seed(7)
    fresh = AttentiveClassifier(D, K, {"name": "ep", "queries": 1}).train()
    order = next(probe.steps(16))[0]
    torch.nn.functional.cross_entropy(fresh(train.values[order]), train.label[order]).backward()
    for (name, before), after in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert before.grad is not None
        trust = 0.001 * before.norm() / before.grad.norm() if before.ndim > 1 else 1.0
        expected = before - 2.0 * 16 / 256 * trust * before.grad
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", POOLS)
def test_every_parameter_of_a_pool_gets_a_gradient(name):
    torch.manual_seed(0)
    classifier = AttentiveClassifier(24, K, {"name": name, "queries": 4, "reduction": 2, "num_heads": 3})
    classifier(torch.randn(6, 7, 24)).square().sum().backward()
    for parameter_name, parameter in classifier.named_parameters():
        # A bias of the keys adds the same to all scores of a query, so its gradient is zero but for rounding.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_a_pool_that_does_not_fit_is_one_clear_line():
    with pytest.raises(ValueError, match=r"no pool is called 'simpol'. Did you mean 'simpool'\?"):
        create_pool("simpol", 24)
    with pytest.raises(ValueError, match="queries=5 times reduction=2 must divide the 24 channels"):
        create_pool("ep", 24, queries=5, reduction=2)
    with pytest.raises(ValueError, match="num_heads=5 must divide the 24 channels"):
        create_pool("aim", 24, num_heads=5)
