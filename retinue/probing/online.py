"""Quality of a net's features while it is pretrained: the probes of this package with one setting each."""

import torch
from torch import Tensor

from retinue.probing.choice import Probe, predict
from retinue.probing.features import Features
from retinue.probing.linear import LogisticProbe
from retinue.probing.neighbours import NeighbourProbe


def knn_top1(bank: Tensor, labels: Tensor, features: Tensor, neighbours: int = 20, temperature: float = 0.07) -> Tensor:
    """Return the class that the nearest neighbours in a bank vote for, int64 (N,) on the CPU.

    Args:
        bank: Features (M, D) of images whose class is known.
        labels: Their labels, int64 (M,).
        features: Features (N, D).
        neighbours: Number of neighbours, at most M of which are there.
        temperature: Temperature of the votes.
    """
    probe = NeighbourProbe(int(labels.max()) + 1, [min(neighbours, len(bank))], temperature)
    return _classes(probe, bank, labels, features)


def probe_top1(bank: Tensor, labels: Tensor, features: Tensor, decay: float = 1e-3, steps: int = 100) -> Tensor:
    """Return the class that a logistic regression on the bank predicts, int64 (N,) on the CPU.

    Args:
        bank: Features (M, D) of images whose class is known.
        labels: Their labels, int64 (M,).
        features: Features (N, D).
        decay: Factor of half the sum of squared weights that is added to the mean loss.
        steps: Maximum number of steps of L-BFGS.
    """
    probe = LogisticProbe(int(labels.max()) + 1, [1 / (decay * len(bank))], steps)
    return _classes(probe, bank, labels, features)


def _classes(probe: Probe, bank: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since tensors of inference mode take no part in a backward pass.
        train = Features(bank.float().clone(), labels.clone(), torch.arange(len(bank)))
        scores = probe.fit(train, probe.settings)
        return predict(scores, features.float().clone())[0].argmax(1)
