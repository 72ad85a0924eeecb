"""Predictions of a simulated classifier, which several tests share."""

import numpy as np
import pytest

from retinue.evaluation.classification import Predictions


def predict(num_images: int, num_classes: int, seed: int = 0, sharpness: float = 1.0) -> Predictions:
    """Return the predictions of a net that is mostly right; `sharpness` scales its confidence."""
    rng = np.random.default_rng(seed)
    label = rng.integers(num_classes, size=num_images)
    logits = rng.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), label] += 2
    probs = np.exp(sharpness * logits)
    probs /= probs.sum(1, keepdims=True)
    topk = np.argsort(-probs, 1)[:, :5]
    loss = -np.log(probs[np.arange(num_images), label])
    brier = ((probs - np.eye(num_classes)[label]) ** 2).sum(1)
    return Predictions(np.arange(num_images), label, topk, np.take_along_axis(probs, topk, 1), loss, brier)


@pytest.fixture
def predictions() -> Predictions:
    return predict(500, 10)
