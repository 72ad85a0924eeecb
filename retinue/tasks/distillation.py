"""Distillation from a teacher in timm's registry.

Scores: Hinton et al., arXiv:1503.02531; hard labels and the distillation token: DeiT, arXiv:2012.12877. Tokens: as in
Sparsifiner, arXiv:2303.13755. `retinue.tasks.map_distillation` compares maps.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from datamodules.batch import channel_values
from datamodules.loader import private_rng
from models.backbone import Backbone
from models.factory import check_name, image_size_argument
from models.plain import PlainBackbone
from models.preprocessing import net_preprocessing, read_run, run_config
from models.weights import load_weights
from retinue.tasks.map_distillation import Level


class Answer(NamedTuple):
    """Outputs of a teacher for a batch.

    Attributes:
        logits: (B, K).
        tokens: Final tokens (B, N, C), or None if they are not wanted.
        scores: Scores of the places of a grid (B, K, h, w), or None if they are not wanted.
        maps: The wanted maps, (B, C, H, W) each.
    """

    logits: Tensor
    tokens: Tensor | None = None
    scores: Tensor | None = None
    maps: Sequence[Tensor] = ()


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
            # The initial weights draw random numbers, and a resumed run loads the teacher in another step.
            with private_rng():
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
        own = self.preprocessing
        # Only nets that are built for one size have the argument.
        if image_size_argument(self.teacher, self.size) and image.shape[2:] != self.size:
            image = F.interpolate(image, self.size, mode="bicubic", antialias=True)
        return restandardise(image, mean, std, own["mean"], own["std"])

    @torch.no_grad()
    def answer(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's logits (B, K), and its final tokens (B, N, C) if they are wanted, else None.

        Args:
            image: The student's images (B, C, H, W), normalised with `mean` and `std`.
            mean: The student's mean of each channel.
            std: The student's standard deviation of each channel.
        """
        return self.answer_densely(image, mean, std, None)[:2]

    @torch.no_grad()
    def answer_densely(
        self,
        image: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        grid: tuple[int, int] | None,
        maps: Sequence[int] = (),
    ) -> Answer:
        """Return what `answer` returns, the teacher's scores for each token of a grid, and maps.

        Args:
            image: The student's images (B, C, H, W), normalised with `mean` and `std`.
            mean: The student's mean of each channel.
            std: The student's standard deviation of each channel.
            grid: Rows h and columns w of the grid; None for no scores of tokens.
            maps: Indices of the wanted maps in the teacher's `feature_info`, ascending.
        """
        net: Any = self.net
        # Moving the net again in each step would take as long as launching its kernels.
        if next(net.parameters()).device != image.device:
            net.to(image.device)
        image = self.see(image, mean, std)
        if not self.tokens and grid is None and not maps:
            return Answer(net(image))
        if maps:
            features, chosen = net.forward_intermediates(image, indices=list(maps))
        else:
            features, chosen = net.forward_features(image), ()
        tokens = scores = None
        if self.tokens:
            plain = isinstance(net, PlainBackbone)
            tokens = net.distillation_tokens(features) if plain else features[:, prefix_tokens(net) :]
        if grid is not None:
            scores = F.interpolate(dense_scores(net, features, image.shape[2:]), grid, mode="bilinear", antialias=True)
        return Answer(net.forward_head(features), tokens, scores, chosen)

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


def restandardise(
    image: Tensor, mean: Sequence[float], std: Sequence[float], new_mean: Sequence[float], new_std: Sequence[float]
) -> Tensor:
    """Return images (B, C, H, W) that were normalised with `mean` and `std` as others normalise them.

    Args:
        image: The images.
        mean: Mean of each channel with which the images were normalised.
        std: Standard deviation of each channel with which the images were normalised.
        new_mean: Mean of each channel of the result's normalisation.
        new_std: Standard deviation of each channel of the result's normalisation.
    """

    def column(values: Sequence[float]) -> Tensor:
        return channel_values(tuple(values), image.device).view(-1, 1, 1)

    return (image * column(std) + column(mean) - column(new_mean)) / column(new_std)


@torch.no_grad()
def map_levels(net: Any, image: Tensor, who: str) -> list[Level]:
    """Return the maps of a classifier, after a check that its scores can be computed together with them.

    Args:
        net: Classifier of timm's registry.
        image: An image (1, C, H, W) as the net takes it.
        who: What the message calls the net, such as `teacher`.

    Raises:
        ValueError: The net has no maps, its maps do not have their strides, or what `forward_intermediates` returns
            does not lead to the scores of the forward pass.
    """
    found = [Level(info["num_chs"], info["reduction"]) for info in getattr(net, "feature_info", ())]
    if not found or not hasattr(net, "forward_intermediates"):
        raise ValueError(f"task.distillation.maps: the {who}, a {type(net).__name__}, has no maps to compare")
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    with torch.random.fork_rng(devices=[]):
        # Some ops draw random numbers in evaluation too.
        torch.manual_seed(0)
        scores = net(image)
        torch.manual_seed(0)
        features, maps = net.forward_intermediates(image)
        same = torch.allclose(net.forward_head(features), scores, rtol=1e-3, atol=1e-4)
    for module, training in modes:
        module.training = training
    # A pruned map has all of its tokens in one row.
    pruned = any(2 * m.shape[2] < image.shape[2] // level.stride for m, level in zip(maps, found, strict=False))
    if not same or pruned or len(maps) != len(found):
        raise ValueError(
            f"task.distillation.maps: a {type(net).__name__} as {who} does not give its scores and maps at once; "
            "task.distillation.maps.loss=null compares scores alone"
        )
    return found


def prefix_tokens(net: Any) -> int:
    """Return the number of tokens before those of the map in a net's final features."""
    return net.extra if isinstance(net, PlainBackbone) else getattr(net, "num_prefix_tokens", 0)


def dense_scores(net: Any, features: Tensor, image_size: Sequence[int]) -> Tensor:
    """Return a net's class scores for each place of its final map, (B, K, h, w).

    A classifier of tokens scores them if the net has one. In other nets, the head scores each place as an image of one
    place (Jiang et al., arXiv:2104.10858, section 3.2).

    Args:
        net: Classifier of timm's registry.
        features: What its `forward_features` returned: tokens (B, E + N, C), or a map in (B, C, h, w) or (B, h, w, C).
        image_size: Height and width of the images, whose shape the map has.

    Raises:
        ValueError: The features are no map.
    """
    if isinstance(net, Backbone) and net.token_classifier is not None:
        places = net.map_tokens(features)
        return _as_map(net.token_classifier(places), image_size)
    if features.ndim == 3:
        extra = prefix_tokens(net)
        places = features[:, extra:]
        # Every token also stands for the class token that the head may read.
        one = places.reshape(-1, 1, places.shape[-1]).expand(-1, 1 + extra, -1)
        return _as_map(net.forward_head(one).unflatten(0, places.shape[:2]), image_size)
    if features.ndim != 4:
        raise ValueError(f"the teacher's features must be a map or tokens, not of shape {tuple(features.shape)}")
    channels_first = features.shape[1] == net.num_features
    places = features.permute(0, 2, 3, 1) if channels_first else features  # (B, h, w, C)
    one = places.reshape(-1, 1, 1, places.shape[-1])
    scores = net.forward_head(one.permute(0, 3, 1, 2) if channels_first else one)
    return scores.unflatten(0, places.shape[:3]).permute(0, 3, 1, 2)


def _as_map(scores: Tensor, image_size: Sequence[int]) -> Tensor:
    """Return scores of tokens (B, N, K) as a map (B, K, h, w) of the images' shape."""
    tokens = scores.shape[1]
    rows = max(1, round(math.sqrt(tokens * image_size[0] / image_size[1])))
    if tokens % rows:
        raise ValueError(f"the teacher's {tokens} tokens are no map: a teacher for token labels must keep all tokens")
    return scores.transpose(1, 2).unflatten(2, (rows, tokens // rows))
