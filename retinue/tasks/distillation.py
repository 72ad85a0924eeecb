"""Distillation from a teacher in timm's registry.

Scores: Hinton et al., arXiv:1503.02531; hard labels and the distillation token: DeiT, arXiv:2012.12877. Tokens: as in
Sparsifiner, arXiv:2303.13755.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import timm
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from datamodules.batch import channel_values
from models.factory import check_name, image_size_argument
from models.plain import PlainBackbone
from models.preprocessing import net_preprocessing, read_run, run_config
from models.weights import load_weights


class Teacher:
    """A frozen net from whose scores, and on request from whose final tokens, a student learns.

    The teacher sees the student's images with the mean and deviation that the teacher's weights were trained with. The
    images have the student's size, unless the teacher takes images of one size only: then they are resized to it.

    This class is not an `nn.Module`, so that the teacher is not part of the student's checkpoints, optimiser and
    average of weights.

    Args:
        teacher: Name of a net in timm's registry, which has our nets too.
        weights: Weights file of the teacher; None takes timm's pretrained weights.
        mode: "soft" (KL divergence at `temperature`) or "hard" (cross-entropy with the teacher's most likely class).
        alpha: Share of the teacher's part in the loss, from 0 to 1.
        temperature: Divisor of the logits in mode "soft".
        tokens: Weight of the loss `tokens`, the mean squared distance of the student's final tokens from the teacher's;
            0 leaves it out. Both nets are ViT-shaped and have the same tokens.
        num_classes: Number of classes.

    Raises:
        ValueError: The name or the mode is unknown. Training raises one when it first uses the teacher, if there are no
            weights or they do not fit.
    """

    def __init__(
        self,
        *,
        teacher: str,
        weights: str | None,
        mode: str,
        alpha: float,
        temperature: float,
        num_classes: int,
        tokens: float = 0.0,
    ):
        if mode not in ("soft", "hard"):
            raise ValueError(f"task.distillation.mode must be soft or hard, not {mode!r}")
        check_name(teacher)
        self.teacher, self.weights, self.num_classes = teacher, weights, num_classes
        self.mode, self.alpha, self.temperature, self.tokens = mode, alpha, temperature, tokens

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """Preprocessing that the teacher's weights were trained with, by the keys of `models.preprocessing.KEYS`."""
        values = net_preprocessing(self.teacher)
        config = run_config(self.weights) if self.weights is not None else None
        return values if config is None else values | read_run(config)[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), in pixels, of the images that the teacher's weights were trained with."""
        size = self.preprocessing["image_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @cached_property
    def net(self) -> nn.Module:
        """The teacher. It is loaded when training first uses it, since the evaluation of a student needs no teacher."""
        try:
            net = timm.create_model(
                self.teacher,
                pretrained=self.weights is None,
                num_classes=self.num_classes,
                in_chans=len(self.preprocessing["mean"]),
                **image_size_argument(self.teacher, self.size),
            )
        except RuntimeError as error:
            # timm has no pretrained weights of that name.
            raise ValueError(f"task.distillation.teacher={self.teacher} needs task.distillation.weights") from error
        if self.weights is not None:
            load_weights(net, self.weights)
        if rank_zero_only.rank == 0:
            mean, std = (" ".join(f"{value:g}" for value in self.preprocessing[key]) for key in ("mean", "std"))
            print(f"teacher {self.teacher}: mean {mean}, std {std}", flush=True)
        return net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> "Teacher":
        # The average of the student's weights copies the task; it needs no second teacher.
        return self

    def see(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the student's images as the teacher's weights expect them.

        Args:
            image: The student's images (B, C, H, W), normalised with `mean` and `std`.
            mean: The student's mean of each channel.
            std: The student's standard deviation of each channel.
        """

        def column(values: Sequence[float]) -> Tensor:
            return channel_values(tuple(values), image.device).view(-1, 1, 1)

        own = self.preprocessing
        image = image * column(std) + column(mean)
        # Only nets that are built for one size have the argument.
        if image_size_argument(self.teacher, self.size) and image.shape[2:] != self.size:
            image = F.interpolate(image, self.size, mode="bicubic", antialias=True)
        return (image - column(own["mean"])) / column(own["std"])

    @torch.no_grad()
    def answer(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's logits (B, K), and its final tokens (B, N, C) if they are wanted, else None.

        Args:
            image: The student's images (B, C, H, W), normalised with `mean` and `std`.
            mean: The student's mean of each channel.
            std: The student's standard deviation of each channel.
        """
        net: Any = self.net
        # Moving the net again in each step would take as long as launching its kernels.
        if next(net.parameters()).device != image.device:
            net.to(image.device)
        image = self.see(image, mean, std)
        if not self.tokens:
            return net(image), None
        features = net.forward_features(image)
        if isinstance(net, PlainBackbone):
            return net.forward_head(features), net.distillation_tokens(features)
        return net.forward_head(features), features[:, getattr(net, "num_prefix_tokens", 0) :]

    def blend(self, loss: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return (1 - alpha) * loss + alpha * distillation loss, a scalar.

        Args:
            loss: The student's loss on the targets, a scalar.
            logits: The student's logits (B, K).
            teacher_logits: The teacher's logits (B, K).
        """
        if self.mode == "hard":
            distillation_loss = F.cross_entropy(logits, teacher_logits.argmax(1))
        else:
            student = F.log_softmax(logits.float() / self.temperature, -1)
            target = F.log_softmax(teacher_logits.float() / self.temperature, -1)
            # The factor keeps the size of the gradients independent of the temperature.
            distillation_loss = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.alpha) * loss + self.alpha * distillation_loss
