"""Refinement of a feature pyramid by prototypes of the classes and of the background, for training on few objects.

Paper: Remedying Target-Domain Astigmatism for Cross-Domain Few-Shot Object Detection (Jiang et al., CVPR 2026,
arXiv:2603.18541), whose authors published no code. Of its three modules this one has the two that need no text,
positive pattern refinement and negative context modulation, written after descriptions of them; the third one aligns
the background with texts by a language model. The thresholds and the average over steps are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.precision import without_autocast


class Objects(NamedTuple):
    """Objects in a batch of images, from which prototypes are computed.

    Attributes:
        boxes: For each image, the boxes (N_i, 4) of its objects, xyxy in pixels.
        labels: For each image, the classes (N_i,).
        ignored: For each image, boxes (M_i, 4) of what is neither an object nor background.
        sizes: (B, 2), height and width of each image without its padding.
        padded_size: Height and width of the images with their padding.
    """

    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    ignored: Sequence[Tensor]
    sizes: Tensor
    padded_size: tuple[int, int]


class PrototypeRefinement(nn.Module):
    """Adds prototypes to a pyramid's features, so that the features of one object become more alike.

    A prototype is the mean feature of a class or of the background on one level, averaged over training steps. Features
    whose cosine similarity with a class's prototype is at least `threshold` belong to the foreground, and receive the
    mean of the classes' prototypes, weighted by a softmax of the similarities. Of the other features, those that are as
    similar to the background's prototype receive this one. The remaining features stay as they are.

    Takes maps (B, channels, H_i, W_i), finest first, and returns a tuple of maps of the same shapes. In training,
    `objects` must hold the batch's objects; a forward pass learns the prototypes from them and removes them. No
    parameter is trained.

    Args:
        channels: Number of channels of every level.
        levels: Number of levels.
        num_classes: Number of classes.
        threshold: Smallest cosine similarity with a prototype that counts.
        temperature: Divisor of the similarities in the softmax.
        gain: Factor of a prototype that is added.
        momentum: Weight of the old prototype in the average, each step.

    Attributes:
        prototypes: (levels, num_classes + 1, channels); the last one is the background's.
        seen: bool (levels, num_classes + 1), which prototypes have been learnt.
        objects: Objects of the next batch, in training.
    """

    # A detector without prototypes loads, too.
    optional = True
    prototypes: Tensor
    seen: Tensor

    def __init__(
        self,
        channels: int,
        levels: int,
        num_classes: int,
        threshold: float = 0.75,
        temperature: float = 0.1,
        gain: float = 1.0,
        momentum: float = 0.9,
    ):
        super().__init__()
        self.threshold, self.temperature, self.gain, self.momentum = threshold, temperature, gain, momentum
        self.register_buffer("prototypes", torch.zeros(levels, num_classes + 1, channels))
        self.register_buffer("seen", torch.zeros(levels, num_classes + 1, dtype=torch.bool))
        self.objects: Objects | None = None

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        objects, self.objects = self.objects, None
        # Sums over many positions and similarities near the threshold need single precision.
        with without_autocast(maps[0]):
            # Without gradients, a pass in training mode only estimates batch norm's statistics.
            if self.training and objects is not None and torch.is_grad_enabled():
                for level, x in enumerate(maps):
                    self.learn(level, x.float(), objects)
            return tuple(x + self.gain * self.addition(level, x.float()).to(x.dtype) for level, x in enumerate(maps))

    @torch.no_grad()
    def learn(self, level: int, x: Tensor, objects: Objects) -> None:
        """Average the prototypes of a level with the mean features of a batch's objects and of its background.

        Args:
            level: Index of the level.
            x: Map of the level, (B, channels, H, W).
            objects: The batch's objects.
        """
        regions = regions_of(objects, x.shape[2:], self.prototypes.shape[1] - 1).flatten(2).float()
        counts = regions.sum(dim=(0, 2))
        means = torch.einsum("brp,bcp->rc", regions, x.flatten(2)) / counts.clamp(min=1)[:, None]
        momentum = self.momentum * self.seen[level].float()[:, None]
        averages = momentum * self.prototypes[level] + (1 - momentum) * means
        self.prototypes[level] = torch.where(counts[:, None] > 0, averages, self.prototypes[level])
        self.seen[level] |= counts > 0

    def addition(self, level: int, x: Tensor) -> Tensor:
        """Return what is added to the map x (B, channels, H, W) of a level: prototypes, or zeros."""
        prototypes = self.prototypes[level]
        similarity = torch.einsum("bchw,kc->bkhw", F.normalize(x, dim=1), F.normalize(prototypes, dim=1))
        classes, background = similarity[:, :-1], similarity[:, -1:]
        is_foreground = classes.amax(dim=1, keepdim=True) >= self.threshold
        is_background = ~is_foreground & (background >= self.threshold)
        # A class that has not been seen has no prototype to take part.
        scores = (classes / self.temperature).masked_fill(~self.seen[level, :-1, None, None], -1e4)
        mixed = torch.einsum("bkhw,kc->bchw", scores.softmax(dim=1), prototypes[:-1])
        return is_foreground * mixed + is_background * prototypes[-1][:, None, None]


def regions_of(objects: Objects, size: Sequence[int], num_classes: int) -> Tensor:
    """Return the regions of the classes and of the background on a map: bool (B, num_classes + 1, H, W).

    A position belongs to the boxes that its centre is in. The background is what belongs to no box, ignored or not, and
    is not padding.

    Args:
        objects: Objects of a batch.
        size: Height and width of the map.
        num_classes: Number of classes.
    """
    device = objects.sizes.device
    y, x = (
        (torch.arange(cells, device=device) + 0.5) * (pixels / cells)
        for cells, pixels in zip(size, objects.padded_size, strict=True)
    )

    def inside(boxes: Tensor) -> Tensor:
        x1, y1, x2, y2 = boxes.float()[:, :, None, None].unbind(1)  # (N, 1, 1)
        return (x >= x1) & (x < x2) & (y[:, None] >= y1) & (y[:, None] < y2)

    regions = []
    for boxes, labels, ignored, (height, width) in zip(*objects[:3], objects.sizes, strict=True):
        in_boxes = inside(boxes)
        of_class = F.one_hot(labels, num_classes).bool()  # (N, num_classes)
        classes = (of_class.T[:, :, None, None] & in_boxes).any(dim=1)
        covered = in_boxes.any(dim=0) | inside(ignored).any(dim=0)
        background = ~covered & (y[:, None] < height) & (x < width)
        regions.append(torch.cat((classes, background[None])))
    return torch.stack(regions)
