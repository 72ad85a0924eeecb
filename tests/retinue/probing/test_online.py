"""Neighbours and the linear probe of a bank, against a loop and scikit-learn."""

import math

import torch

from retinue.probing.online import knn_top1, probe_top1


def test_neighbours_vote_by_similarity():
    generator = torch.Generator().manual_seed(0)
    bank, features = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    labels = torch.randint(4, (50,), generator=generator)
    found = knn_top1(bank, labels, features, neighbours=7, temperature=0.1)
    for feature, label in zip(features, found, strict=True):
        similarity = [float(feature @ row / feature.norm() / row.norm()) for row in bank]
        votes = [0.0] * 4
        for i in sorted(range(50), key=lambda i: -similarity[i])[:7]:
            votes[int(labels[i])] += math.exp(similarity[i] / 0.1)
        assert int(label) == votes.index(max(votes))


def test_a_bank_may_have_fewer_images_than_neighbours():
    assert knn_top1(torch.eye(3), torch.tensor([2, 0, 1]), torch.eye(3)).tolist() == [2, 0, 1]


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 10, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    bank = centres[labels] + torch.randn(200, 10, generator=generator)
    features = centres[labels] + torch.randn(200, 10, generator=generator)
    mean, std = bank.mean(0), bank.std(0, correction=0)
    # scikit-learn's loss is a sum over the images, with C times the inverse of our decay.
    reference = LogisticRegression(C=1 / (1e-3 * 200), max_iter=1000, tol=1e-8)
    reference.fit(((bank - mean) / std).numpy(), labels.numpy())
    expected = reference.predict(((features - mean) / std).numpy())
    with torch.inference_mode():
        found = probe_top1(bank, labels, features, steps=500)
    assert (found.numpy() == expected).mean() >= 0.995
