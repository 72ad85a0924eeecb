"""Supernet of ViT-ResNAS (Liao, Karaman and Sze, 2021, arXiv:2109.00642), trained by multi-architectural sampling.

Written after the paper and what the authors' repository, yilunliao/vit-search, computes. Its licence (CC BY-NC 4.0)
forbids commercial use, so none of its code is here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models.backbones.vit_resnas import ViTResNAS
from models.hierarchical import imagenet_cfg
from models.supernets.vit_resnas_space import KEEP, Architecture, StageSpace, largest, layouts, read_space
from ops.functional import merge_heads
from ops.losses import Losses


class Widths(NamedTuple):
    """Sizes of A architectures in one stage of K blocks.

    Attributes:
        dim: Channels, int64 (A,).
        heads: Attention heads, int64 (A, K).
        hidden: Hidden channels, int64 (A, K).
        kept: 1 for a block that is in the net, else 0, int64 (A, K).
    """

    dim: Tensor
    heads: Tensor
    hidden: Tensor
    kept: Tensor


class ViTResNASSupernet(ViTResNAS):
    """The largest net of a space, whose first channels, heads, hidden channels and blocks are the other nets.

    In training each image passes through one of the drawn architectures: what it lacks is multiplied by 0, and a norm
    counts the channels that it has. In evaluation the largest net runs.

    Args:
        space: Choices of each stage, mappings with the attributes of `StageSpace`.
        images_per_architecture: Number of images of a batch that pass through the same architecture.
        stem: Number of channels of the convolutions before the patches; 0 leaves them out.
        **kwargs: Further arguments of `ViTResNAS` except `layouts` and `mixers`.

    Raises:
        ValueError: The space is not as `read_space` expects it, or there are `mixers`.

    Attributes:
        share: Share of the choices in each list, from the largest on, that architectures are drawn from.
    """

    def __init__(self, space: Sequence[Mapping[str, Any]], images_per_architecture: int = 64, stem: int = 24, **kwargs):
        if kwargs.get("mixers") is not None:
            raise ValueError("a supernet has full attention: model.mixers is for the nets that a search finds")
        self.space = read_space(space)
        super().__init__(layouts(self.space, largest(self.space)), stem, **kwargs)
        self.stem, self.images_per_architecture, self.share = stem, images_per_architecture, 1.0

    def forward_features(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        if not self.training:
            return super().forward_features(x, losses)
        return self.forward_widths(x, self.draw(max(1, len(x) // self.images_per_architecture)))

    def draw(self, count: int) -> list[Widths]:
        """Draw the sizes of some architectures: each choice as often as any other, in an order of chance.

        torch's global generator of the CPU draws.
        """

        def columns(choices: Sequence[int], blocks: int) -> Tensor:
            return torch.stack([draw_evenly(choices, count, self.share) for _ in range(blocks)], 1)

        return [self._draw_stage(stage, count, columns) for stage in self.space]

    def _draw_stage(self, stage: StageSpace, count: int, columns: Any) -> Widths:
        blocks = len(stage.removable)
        dim = draw_evenly(stage.dims, count, self.share)
        heads, hidden, kept = (columns(choices, blocks) for choices in (stage.heads, stage.hidden, KEEP))
        kept[:, ~torch.tensor(stage.removable)] = 1
        return Widths(dim, heads, hidden, kept)

    def forward_as(self, x: Tensor, architecture: Architecture) -> Tensor:
        """Compute the scores (B, num_classes) of one architecture's net for images (B, C, H, W)."""
        widths = [Widths(*(torch.tensor(value)[None] for value in genes)) for genes in architecture]
        return self.forward_head(self.forward_widths(x, widths))

    def forward_widths(self, x: Any, widths: Sequence[Widths]) -> Tensor:
        """Compute the final tokens (B, E + N, C); image i passes through architecture i modulo A.

        Args:
            x: Images (B, C, H, W).
            widths: Sizes of the A architectures in each stage.
        """
        images = x
        channels: Any = None
        stages: Any = self.stages
        for stage, sizes in zip(stages, widths, strict=True):
            if channels is None:
                x, size = stage.downsample(x)
            else:
                x, size = stage.downsample.reduce(x, norm_prefix(stage.downsample.norm, x, channels), size)
            masks = Masks(sizes, images)
            channels = masks.prefix(sizes.dim, x.shape[2])
            x = x * channels
            for j, block in enumerate(stage.blocks):
                x = masks.run_block(block, x, channels, j)
        norm: Any = self.norm
        return norm_prefix(norm, x, channels)

    def importance_orders(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """Yield (parameter, dimension, order): heads and hidden channels, those with the largest weights first.

        Permuting each parameter along its dimension leaves the largest net's function as it is.
        """
        stages: Any = self.stages
        for stage in stages:
            for block in stage.blocks:
                yield from head_orders(block.mixer)
                fc1, fc2 = block.mlp.fc1, block.mlp.fc2
                size = fc1.weight.abs().sum(1) + fc1.bias.abs() + fc2.weight.abs().sum(0)
                order = size.argsort(descending=True, stable=True)
                yield from ((fc1.weight, 0, order), (fc1.bias, 0, order), (fc2.weight, 1, order))


def head_orders(mixer: Any) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """Yield (parameter, dimension, order) for the heads of an attention, as `importance_orders` does."""
    heads = mixer.num_heads
    rows = mixer.qkv.weight.abs().sum(1) + mixer.qkv.bias.abs()  # (3 * heads * D,)
    columns = mixer.proj.weight.abs().sum(0)  # (heads * D,)
    size = rows.view(3, heads, -1).sum((0, 2)) + columns.view(heads, -1).sum(1)
    order = size.argsort(descending=True, stable=True)
    inner = torch.arange(len(columns), device=order.device).view(heads, -1)[order].flatten()
    outer = torch.cat([inner + i * len(columns) for i in range(3)])
    yield from ((mixer.qkv.weight, 0, outer), (mixer.qkv.bias, 0, outer), (mixer.proj.weight, 1, inner))


class Masks:
    """Masks of the images of a batch in one stage.

    Args:
        widths: Sizes of the A architectures in the stage.
        images: Images (B, C, H, W); image i passes through architecture i modulo A.
    """

    def __init__(self, widths: Widths, images: Tensor):
        self.device = images.device
        self.widths, self.index = widths, torch.arange(len(images)) % len(widths.dim)

    def prefix(self, sizes: Tensor, total: int) -> Tensor:
        """Return 1.0 for the first entries and 0.0 for the others, (B, 1, total), of sizes (A,)."""
        numbers = sizes[self.index].to(self.device, non_blocking=True)
        return (torch.arange(total, device=self.device) < numbers[:, None, None]).float()

    def run_block(self, block: Any, x: Tensor, channels: Tensor, j: int) -> Tensor:
        """Run block j on tokens (B, N, C), of which each image has the `channels` (B, 1, C)."""
        added = channels * self.prefix(self.widths.kept[:, j], 1)
        y = norm_prefix(block.norm1, x, channels)
        y = block.mixer.attend(y[:, None])  # (B, heads, N, D)
        y = y * self.prefix(self.widths.heads[:, j], y.shape[1]).transpose(1, 2)[..., None]
        x = x + block.drop_path(block.mixer.proj(merge_heads(y))) * added
        y = block.mlp.act(block.mlp.fc1(norm_prefix(block.norm2, x, channels)))
        y = y * self.prefix(self.widths.hidden[:, j], y.shape[2])
        return x + block.drop_path(block.mlp.fc2(y)) * added


def draw_evenly(choices: Sequence[int], count: int, share: float) -> Tensor:
    """Return `count` of the choices, int64 (count,), in an order of chance.

    Whole rounds through the choices are shuffled, so that no choice is drawn a second time in a small batch before
    nearly all are drawn once.

    Args:
        choices: The choices, the largest first.
        count: Number of draws.
        share: Share of the choices from the largest on, from 0 (the largest alone) to 1 (all).
    """
    allowed = torch.tensor(choices[: 1 + math.floor(share * (len(choices) - 1))])
    rounds = math.ceil(count / len(allowed))
    return allowed[torch.randperm(rounds * len(allowed))[:count] % len(allowed)]


def norm_prefix(norm: nn.LayerNorm, x: Tensor, channels: Tensor) -> Tensor:
    """Normalise tokens (B, N, C) over the channels that each image has; the others are 0 before and after.

    Args:
        norm: Layer norm of all C channels.
        x: Tokens.
        channels: 1.0 for each channel that an image has, else 0.0, (B, 1, C).
    """
    x, count = x.float(), channels.sum(-1, keepdim=True)
    centred = (x - x.sum(-1, keepdim=True) / count) * channels
    scale = (centred.square().sum(-1, keepdim=True) / count + norm.eps).rsqrt()
    return (centred * scale * norm.weight + norm.bias) * channels


default_cfgs = generate_default_cfgs(
    {"vit_resnas_supernet": imagenet_cfg(pool_size=None, fixed_input_size=True, first_conv="stages.0.downsample.proj")}
)


@register_model
def vit_resnas_supernet(pretrained: bool = False, **kwargs) -> ViTResNASSupernet:
    """Return the supernet of a space; `conf/model/vit_resnas_supernet.yaml` has the paper's spaces."""
    return ViTResNASSupernet.build("vit_resnas_supernet", pretrained, **kwargs)
