"""The k nearest neighbours of an image by their features: a classifier that is not trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from retinue.probing.choice import Scores, Setting
from retinue.probing.features import Features

# Added to the share of the votes of each class, so that a class without votes has a finite loss.
SMALLEST_SHARE = 1e-8


@dataclass(frozen=True)
class NeighbourProbe:
    """Weighted vote of the k nearest training images (Wu et al. 2018, arXiv:1805.01978; DINO, arXiv:2104.14294).

    Each neighbour votes for its class with the weight exp(cosine similarity / temperature).

    Attributes:
        num_classes: Number of classes K.
        numbers: Numbers k of neighbours.
        temperature: Temperature of the weights.
    """

    num_classes: int
    numbers: Sequence[int]
    temperature: float

    @property
    def settings(self) -> list[Setting]:
        return [{"k": number} for number in self.numbers]

    def fit(self, train: Features, settings: Sequence[Setting]) -> Scores:
        """Keep the normalised features.

        Raises:
            ValueError: There are fewer images than neighbours.
        """
        gallery, numbers = F.normalize(train.values), [setting["k"] for setting in settings]
        if max(numbers) > len(gallery):
            raise ValueError(f"k={max(numbers)} neighbours are more than the {len(gallery)} images; take fewer")

        def scores(values: Tensor) -> Tensor:
            similarity, rows = (F.normalize(values.to(gallery.device)) @ gallery.T).topk(max(numbers))
            weights = (similarity / self.temperature).exp()
            votes = weights.new_zeros(len(numbers), len(values), self.num_classes)
            for vote, number in zip(votes, numbers, strict=True):
                vote.scatter_add_(1, train.label[rows[:, :number]], weights[:, :number])
            return (votes / votes.sum(-1, keepdim=True) + SMALLEST_SHARE).log()

        return scores
