"""Attentive probe: a small pool of the frozen tokens and a linear classifier are trained together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from torch import Tensor, nn

from models.layers.attentive_pools import create_pool
from retinue.probing.choice import Scores, Setting
from retinue.probing.features import Features


class AttentiveClassifier(nn.Module):
    """Pool tokens (B, T, D), normalise the result by a batch norm without weights, and classify it: (B, K).

    Args:
        dim: Channels of the tokens D.
        num_classes: Number of classes K.
        pool: Name of the pool, and its arguments, as `create_pool` takes them.
    """

    def __init__(self, dim: int, num_classes: int, pool: Mapping[str, Any]):
        super().__init__()
        self.pool = create_pool(dim=dim, **pool)
        self.norm = nn.BatchNorm1d(self.pool.out_dim, affine=False, eps=1e-6)
        self.classifier = nn.Linear(self.pool.out_dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.norm(self.pool(tokens)))


@dataclass(frozen=True)
class AttentiveProbe:
    """Attentive classifier, trained with a linear warm-up and a cosine schedule (efficient probing, arXiv:2506.10178).

    Attributes:
        num_classes: Number of classes K.
        pool: Name of the pool, and its arguments, as `create_pool` takes them.
        optimizer: lars, as in the paper, which takes tens of thousands of steps, or adamw. Neither decays weights.
        learning_rates: Learning rates for 256 images a step; they scale linearly with the batch size.
        epochs: Passes over the training images.
        warmup_epochs: Epochs in which the learning rate rises linearly.
        batch_size: Images in a step, at most all of them.
        seed: Seed of the weights and of the order of the images.
        device: Device that trains; the features stay where they are.
    """

    num_classes: int
    pool: Mapping[str, Any]
    optimizer: Literal["lars", "adamw"]
    learning_rates: Sequence[float]
    epochs: int
    warmup_epochs: float
    batch_size: int
    seed: int
    device: torch.device

    @property
    def settings(self) -> list[Setting]:
        return [{"learning_rate": rate} for rate in self.learning_rates]

    def fit(self, train: Features, settings: Sequence[Setting]) -> Scores:
        """Train one classifier for each setting.

        Raises:
            ValueError: An argument of the pool does not divide the channels of the tokens.
        """
        classifiers = [self.train(train, setting["learning_rate"]) for setting in settings]
        return lambda values: torch.stack([classifier(values.to(self.device)) for classifier in classifiers])

    def train(self, train: Features, learning_rate: float) -> nn.Module:
        """Return a trained classifier, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            classifier = AttentiveClassifier(train.values.shape[-1], self.num_classes, self.pool)
        classifier.to(self.device).train()
        optimizer = self.create_optimizer(classifier)
        for rows, factor in self.steps(len(train.label)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor * len(rows) / 256
            loss = F.cross_entropy(classifier(train.values[rows].to(self.device)), train.label[rows].to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return classifier.eval()

    def create_optimizer(self, classifier: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser; LARS adapts the rate of matrices and queries only, as the authors' does."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(classifier.parameters(), weight_decay=0.0)
        groups = [
            {
                "params": [p for p in classifier.parameters() if (p.ndim > 1) == adapts],
                "momentum": 0.9,
                "always_adapt": adapts,
            }
            for adapts in (True, False)
        ]
        return Lars(groups)

    def steps(self, images: int) -> Iterator[tuple[Tensor, float]]:
        """Yield the positions of the images of each step, and the factor of its learning rate."""
        batch_size = min(self.batch_size, images)
        generator, steps = torch.Generator().manual_seed(self.seed), images // batch_size
        for epoch in range(self.epochs):
            order = torch.randperm(images, generator=generator)
            for step in range(steps):
                now = epoch + step / steps
                if now < self.warmup_epochs:
                    factor = now / self.warmup_epochs
                else:
                    progress = (now - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
                    factor = 0.5 * (1 + math.cos(math.pi * progress))
                yield order[step * batch_size :][:batch_size], factor
