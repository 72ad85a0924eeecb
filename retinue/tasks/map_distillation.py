"""Distillation of maps: losses between maps of a student and of a frozen teacher.

- `mse`: mean squared distance, as the hints of FitNets (Romero et al., arXiv:1412.6550).
- `normalised_mse`: squared distance of each place's channels after both were scaled to unit length.
- `cwd`: KL divergence of each channel's distribution over the places (Shu et al., arXiv:2011.13256).
- `gram`: squared distance of the cosine similarities between all places of an image, the pair-wise loss of Liu et al.,
  arXiv:1903.04197.
- `mgd`: mean squared distance of maps that two convolutions generate from the student's masked maps (Yang et al.,
  arXiv:2205.01529). The paper has the sum over channels and places in place of the mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("mse", "normalised_mse", "cwd", "gram", "mgd")
# Largest number of rows and of columns between whose places `gram` compares; larger maps are averaged to this size.
GRAM_SIDE = 16


class Level(NamedTuple):
    """One of a net's maps: its number of channels, and its stride in pixels."""

    channels: int
    stride: int


class MapDistillation(nn.Module):
    """Loss between chosen maps of a student and of a teacher, the sum over the pairs of maps.

    A 1 x 1 convolution projects each of the student's maps to the channels of its teacher's map. The convolution begins
    as the identity where the two numbers of channels are equal. `gram` needs no projection. A map of another size than
    the teacher's is then resized to the teacher's, bilinearly. This module belongs to the task: checkpoints hold it, so
    that a run goes on exactly, and the student's own weights do not.

    Args:
        student_levels: All maps of the student, in the net's order.
        teacher_levels: All maps of the teacher, in the net's order.
        loss: One of `LOSSES`.
        weight: Weight of this loss beside the task's own.
        temperature: Divisor of the maps in `cwd`.
        masked: Share of the places that `mgd` masks.
        student: Indices of the student's maps, ascending. None takes the last map of each stride that both nets have.
        teacher: Indices of the teacher's maps, as many.
        project: False leaves out the projections, for maps whose channels have the same meanings, such as classes.

    Attributes:
        student_indices: Indices of the student's maps that are compared.
        teacher_indices: Indices of the teacher's maps that these are compared with.

    Raises:
        ValueError: The loss or an index is unknown, the two lists of indices do not match, or no stride is common.
    """

    def __init__(
        self,
        student_levels: Sequence[Level],
        teacher_levels: Sequence[Level],
        *,
        loss: str,
        weight: float = 1.0,
        temperature: float = 1.0,
        masked: float = 0.65,
        student: Sequence[int] | None = None,
        teacher: Sequence[int] | None = None,
        project: bool = True,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"task.distillation.maps.loss must be one of {', '.join(LOSSES)}, not {loss!r}")
        self.loss, self.weight, self.temperature, self.masked = loss, weight, temperature, masked
        pairs = pair_maps(student_levels, teacher_levels, student, teacher)
        self.student_indices, self.teacher_indices = pairs
        widths = [
            (student_levels[i].channels, teacher_levels[j].channels)
            for i, j in zip(*pairs, strict=True)
        ]  # fmt: skip
        project = project and loss != "gram"
        self.projections = nn.ModuleList(projection(*pair) if project else nn.Identity() for pair in widths)
        self.generators = nn.ModuleList(generator(width) for _, width in widths if loss == "mgd")

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Compute the loss without its weight, a scalar in float32.

        Args:
            student: Maps `student_indices` of the student, (B, C, H, W) each.
            teacher: Maps `teacher_indices` of the teacher for the same images, without gradient.
        """
        terms = []
        for i, (own, target) in enumerate(zip(student, teacher, strict=True)):
            own = self.projections[i](own)
            if own.shape[2:] != target.shape[2:]:
                own = F.interpolate(own, target.shape[2:], mode="bilinear", align_corners=False)
            if self.loss == "mgd":
                kept = torch.rand(len(own), 1, *own.shape[2:], device=own.device) >= self.masked
                own = self.generators[i](own * kept)
            # Half precision would round the sums over places.
            with torch.autocast(own.device.type, enabled=False):
                terms.append(self.compare(own.float(), target.float()))
        return torch.stack(terms).sum()

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss between two maps (B, C, H, W); those of `gram` may differ in their channels."""
        if self.loss == "normalised_mse":
            return normalised_mse(student, teacher)
        if self.loss == "cwd":
            return channel_divergence(student, teacher, self.temperature)
        if self.loss == "gram":
            return gram_distance(student, teacher)
        return F.mse_loss(student, teacher)


def pair_maps(
    student: Sequence[Level], teacher: Sequence[Level], own: Sequence[int] | None, others: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Return the indices of the student's maps, and those of the teacher's maps that they are compared with.

    Args:
        student: All maps of the student.
        teacher: All maps of the teacher.
        own: Chosen indices of the student's maps; None pairs the last maps of each stride that both nets have.
        others: Chosen indices of the teacher's maps.

    Raises:
        ValueError: The lists of indices do not match the maps or each other, or no stride is common.
    """
    if own is None and others is None:
        # The dictionary keeps the last of several maps of one stride.
        by_stride = [{level.stride: i for i, level in enumerate(levels)} for levels in (student, teacher)]
        common = sorted(by_stride[0].keys() & by_stride[1].keys())
        if not common:
            strides = [", ".join(str(stride) for stride in found) for found in by_stride]
            raise ValueError(
                f"the student's maps have the strides {strides[0]} and the teacher's {strides[1]}, none in common: "
                f"choose pairs, as task.distillation.maps.student=[{len(student) - 1}] "
                f"task.distillation.maps.teacher=[{len(teacher) - 1}]"
            )
        # In the order of the maps, which a net returns from the first to the last.
        pairs = sorted((by_stride[0][stride], by_stride[1][stride]) for stride in common)
        return [i for i, _ in pairs], [j for _, j in pairs]
    own, others = list(own or ()), list(others or ())
    if len(own) != len(others) or not own:
        raise ValueError(
            "task.distillation.maps.student and task.distillation.maps.teacher must name equally many maps, "
            f"not {own} and {others}"
        )
    for key, indices, levels in (("student", own, student), ("teacher", others, teacher)):
        if indices != sorted(set(indices)) or not all(0 <= i < len(levels) for i in indices):
            raise ValueError(
                f"task.distillation.maps.{key} must be ascending indices from 0 to {len(levels) - 1}, not {indices}"
            )
    return own, others


def projection(channels: int, target: int) -> nn.Module:
    """Return a 1 x 1 convolution, which begins as the identity if the numbers of channels are equal."""
    layer = nn.Conv2d(channels, target, 1)
    if channels == target:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer


def generator(channels: int) -> nn.Module:
    """Return the two 3 x 3 convolutions by which MGD generates the teacher's map."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )  # fmt: skip


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of the unit vectors of each place, the mean over places: from 0 to 4."""
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(1).mean()


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of each channel's softmax over the places, the mean over channels and images.

    The divergence is multiplied by the square of the temperature, which keeps the size of the gradients.
    """
    own, target = (
        F.log_softmax(x.flatten(2).flatten(0, 1) / temperature, -1) for x in (student, teacher)
    )  # (B * C, N)
    return F.kl_div(own, target, reduction="batchmean", log_target=True) * temperature**2


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of the cosine similarities between all places, the mean over images and pairs."""
    size = min(teacher.shape[2], GRAM_SIDE), min(teacher.shape[3], GRAM_SIDE)

    def similarities(x: Tensor) -> Tensor:
        vectors = F.normalize(F.adaptive_avg_pool2d(x, size).flatten(2), dim=1)  # (B, C, N)
        return vectors.transpose(1, 2) @ vectors

    return F.mse_loss(similarities(student), similarities(teacher))
