"""Linear classifiers of features: by SGD, with many settings at once, and by L-BFGS to the optimum."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retinue.probing.choice import Scores, Setting, standardiser
from retinue.probing.features import Features

MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearProbe:
    """Linear classifier by SGD with momentum and a cosine schedule, on standardised features.

    All settings are trained at the same time, on the same batches, as in DINOv2 (arXiv:2304.07193).

    Attributes:
        num_classes: Number of classes K.
        learning_rates: Learning rates for 256 images a step; they scale linearly with the batch size.
        weight_decays: Weight decays; the biases have none.
        epochs: Passes over the training images.
        batch_size: Images in a step, at most all of them.
        seed: Seed of the order of the images.
    """

    num_classes: int
    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    epochs: int
    batch_size: int
    seed: int

    @property
    def settings(self) -> list[Setting]:
        pairs = itertools.product(self.learning_rates, self.weight_decays)
        return [{"learning_rate": rate, "weight_decay": decay} for rate, decay in pairs]

    @torch.no_grad()
    def fit(self, train: Features, settings: Sequence[Setting]) -> Scores:
        standardise = standardiser(train.values)
        x, device = standardise(train.values), train.values.device
        images, batch_size = len(x), min(self.batch_size, len(x))
        rate, decay = (
            torch.tensor([setting[name] for setting in settings], device=device)[:, None, None]
            for name in ("learning_rate", "weight_decay")
        )
        rate = rate * batch_size / 256
        weight = x.new_zeros(len(settings), x.shape[1], self.num_classes)
        bias = x.new_zeros(len(settings), 1, self.num_classes)
        weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
        generator, steps = torch.Generator().manual_seed(self.seed), images // batch_size
        for step in range(self.epochs * steps):
            if step % steps == 0:
                order = torch.randperm(images, generator=generator).to(device)
            rows = order[step % steps * batch_size :][:batch_size]  # pyright: ignore[reportPossiblyUnbound]
            # The gradient of the mean cross-entropy with respect to the logits: (probability - truth) / B.
            gradient = (x[rows] @ weight + bias).softmax(-1)
            gradient[:, torch.arange(batch_size, device=device), train.label[rows]] -= 1
            gradient /= batch_size
            weight_step = MOMENTUM * weight_step + x[rows].T @ gradient + decay * weight
            bias_step = MOMENTUM * bias_step + gradient.sum(1, keepdim=True)
            factor = 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps)))
            weight -= factor * rate * weight_step
            bias -= factor * rate * bias_step
        return lambda values: standardise(values.to(device)) @ weight + bias


@dataclass(frozen=True)
class LogisticProbe:
    """Logistic regression on standardised features by L-BFGS, in float64 where the device has it.

    The objective is scikit-learn's: the sum of the cross-entropies, plus the squared norm of the weights / (2 C).

    Attributes:
        num_classes: Number of classes K.
        strengths: Inverse strengths C of the regularisation; the biases are not regularised.
        max_iterations: Largest number of iterations of L-BFGS.
    """

    num_classes: int
    strengths: Sequence[float]
    max_iterations: int

    @property
    def settings(self) -> list[Setting]:
        return [{"C": strength} for strength in self.strengths]

    def fit(self, train: Features, settings: Sequence[Setting]) -> Scores:
        device = train.values.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = train.values.to(dtype)
        standardise = standardiser(values)
        classifiers = [self.solve(standardise(values), train.label, setting["C"]) for setting in settings]
        weight, bias = (torch.stack(parts) for parts in zip(*classifiers, strict=True))
        return lambda values: standardise(values.to(device, dtype)) @ weight + bias[:, None]

    def solve(self, x: Tensor, label: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Return the weights (D, K) and the biases (K,) for features (N, D)."""
        weight = x.new_zeros(x.shape[1], self.num_classes, requires_grad=True)
        bias = x.new_zeros(self.num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=self.max_iterations, tolerance_grad=1e-6, tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, label) + weight.square().sum() / (2 * strength * len(x))
            loss.backward()
            return loss

        optimizer.step(objective)  # pyright: ignore[reportArgumentType]
        return weight.detach(), bias.detach()
