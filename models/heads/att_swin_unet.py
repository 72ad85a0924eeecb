"""Attention Swin U-Net's decoder: Swin blocks, patch expanding, and cross-contextual attention in the skip connections.

Paper: Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation (Aghdam et al., ISBI
2023, arXiv:2210.16898). Written after the paper and the authors' repository, https://github.com/NITR098/AttSwinUNet (no
licence file), of which no code is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from models.backbones.swin import shifted_window_blocks
from models.hierarchical import init_weights, stage_layout
from ops.functional import merge_heads, split_heads
from retinue.utils.suggestions import nearest

SKIPS = ("ccam", "concat")
# Number of channels of an attention head in the Swin blocks
HEAD_DIM = 32


class CrossAttention(nn.Module):
    """Attention of a token (B, 1, C), normalised, to itself and to a context (B, N, C) that is not normalised.

    Args:
        dim: Number C of channels.
        num_heads: Number of heads.
        head_dim: Number of channels of a head.
    """

    renames = ((r"^to_(q|kv)\.", r"\1."), (r"^to_out\.0\.", "proj."))

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * num_heads * head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, token: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(torch.cat((token, context), dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(token), k, v))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class CrossContextualAttention(nn.Module):
    """Let the mean token of each of two maps attend to the other map (the paper's CCAM).

    Takes two lists of tokens (B, N, C) and returns them with their mean tokens, after the attention, in place of their
    first tokens. As in the authors' code, the first tokens are no keys either.

    Args:
        dim: Number C of channels.
        depth: Number of layers, each with one attention in either direction.
        num_heads: Number of heads.
        head_dim: Number of channels of a head.
        everywhere: Add the mean tokens to all tokens of their maps, instead of replacing the first tokens. The weights
            are the same.
    """

    norms: Any
    attention: Any
    renames = (
        (r"^layers\.(\d+)\.(\d)\.fn\.norm\.", r"norms.\1.\2."),
        (r"^layers\.(\d+)\.(\d)\.fn\.fn\.", r"attention.\1.\2."),
    )

    def __init__(self, dim: int, depth: int = 2, num_heads: int = 8, head_dim: int = 64, everywhere: bool = False):
        super().__init__()
        self.everywhere = everywhere
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)) for _ in range(depth))
        self.attention = nn.ModuleList(
            nn.ModuleList(CrossAttention(dim, num_heads, head_dim) for _ in range(2)) for _ in range(depth)
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        means = [a.mean(1, keepdim=True), b.mean(1, keepdim=True)]
        contexts = b[:, 1:], a[:, 1:]
        for norms, layer in zip(self.norms, self.attention, strict=True):
            means = [
                mean + attention(norm(mean), context)
                for mean, norm, attention, context in zip(means, norms, layer, contexts, strict=True)
            ]
        if self.everywhere:
            return a + means[0], b + means[1]
        return torch.cat((means[0], a[:, 1:]), dim=1), torch.cat((means[1], b[:, 1:]), dim=1)


class PatchExpanding(nn.Module):
    """Enlarge a map (B, in_dim, h, w) to (B, dim, scale h, scale w): each token becomes scale x scale tokens.

    Args:
        in_dim: Number of channels of the input.
        dim: Number of channels of the output.
        scale: Factor of the map's sides.
    """

    def __init__(self, in_dim: int, dim: int, scale: int = 2):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(in_dim, scale**2 * dim, bias=False)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x.permute(0, 2, 3, 1)).unflatten(-1, (self.scale, self.scale, -1))
        # (B, h, w, scale, scale, dim) to (B, dim, h, scale, w, scale)
        return self.norm(x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


class DecoderStage(nn.Module):
    """One resolution of the decoder: join the map with the backbone's, then Swin blocks.

    Takes two maps (B, dim, H, W) and returns a map of the same shape.

    Args:
        dim: Number of channels, a multiple of 32.
        rates: Drop path rates of the blocks.
        window: Side of a window in tokens.
        skip: See `AttSwinUNetHead`.
        everywhere: See `CrossContextualAttention`.
    """

    renames = ((r"^blocks\.(\d+)\.attn\.", r"blocks.\1.mixer."), (r"\.attn_mask$", None))

    def __init__(self, dim: int, rates: Sequence[float], window: int, skip: str, everywhere: bool):
        super().__init__()
        self.exchange = CrossContextualAttention(dim, everywhere=everywhere) if skip == "ccam" else None
        self.join = nn.Linear(2 * dim, dim)
        self.blocks = shifted_window_blocks(dim, dim // HEAD_DIM, window, rates)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2), skip.flatten(2).transpose(1, 2)
        if self.exchange is not None:
            tokens = self.exchange(*tokens)
        joined = self.join(torch.cat(tokens, dim=-1))
        return self.blocks(joined.transpose(1, 2).unflatten(2, size))


class AttSwinUNetHead(nn.Module):
    """Attention Swin U-Net's decoder: four maps of a backbone to logits at the size of the image.

    Takes maps (B, in_channels[i], ⌈H / 4 / 2^i⌉, ⌈W / 4 / 2^i⌉) and returns logits (B, num_classes, 4 ⌈H / 4⌉,
    4 ⌈W / 4⌉). Patch expanding enlarges the coarsest map to stride 16; stages of Swin blocks work at strides 16, 8
    and 4. A linear layer brings a skip map to the decoder's width if the widths differ, which they do not for Swin-T.

    In the authors' net a skip map is the input of a stage of Swin; here a skip map is what a stage of the backbone
    returns. The paper also adds the encoder's attention weights to the decoder's. In the authors' code this happens
    after the weights were applied, so that it changes nothing, and other backbones have no such weights: this decoder
    leaves the sum out.

    Args:
        in_channels: Numbers of channels of the maps of strides 4, 8, 16 and 32.
        num_classes: Number of classes.
        channels: Width of the decoder at stride 4, a multiple of 32; each coarser stride has twice as many.
        depths: Numbers of blocks at strides 4, 8, 16 and 32. As the encoder's last stage, stride 32 counts for the drop
            path rates only.
        window: Side of a window of the Swin blocks in tokens.
        drop_path_rate: Drop path rate of the last block of stride 32; the rates rise linearly from 0 at stride 4.
        skip: `ccam` exchanges mean tokens by cross-contextual attention before a map and its skip map are joined;
            `concat` joins the two only, as Swin-Unet (arXiv:2105.05537) does.
        everywhere: See `CrossContextualAttention`.

    Raises:
        ValueError: There are not four maps or depths, `channels` is not such a multiple, or `skip` is unknown.
    """

    renames = (
        (r"^Crossvit_layer\.(\d)\.", r"stages.\1.exchange."),
        (r"^concat_back_dim\.(\d)\.", lambda match: f"stages.{3 - int(match[1])}.join."),
        (r"^layers_up\.0\.", "expands.2."),
        (r"^layers_up\.(\d)\.blocks\.", lambda match: f"stages.{3 - int(match[1])}.blocks."),
        (r"^layers_up\.(\d)\.upsample\.", lambda match: f"expands.{2 - int(match[1])}."),
        (r"^norm_up\.", "norm."),
        (r"^up\.", "expand."),
        (r"^output\.", "classifier."),
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        window: int = 7,
        drop_path_rate: float = 0.1,
        skip: str = "ccam",
        everywhere: bool = False,
    ):
        super().__init__()
        if len(in_channels) != 4 or len(depths) != 4:
            raise ValueError(
                "AttSwinUNetHead reads four maps, of strides 4, 8, 16 and 32, and takes four depths, "
                f"not {len(in_channels)} and {len(depths)}"
            )
        if channels % HEAD_DIM:
            raise ValueError(f"AttSwinUNetHead's channels must be a multiple of {HEAD_DIM}, not {channels}")
        if skip not in SKIPS:
            raise ValueError(
                f"AttSwinUNetHead's skip must be {' or '.join(SKIPS)}, not {skip!r}.{nearest(skip, SKIPS)}"
            )
        widths, _, rates = stage_layout(channels, depths, drop_path_rate)
        self.laterals = nn.ModuleList(
            nn.Identity() if in_dim == width else nn.Conv2d(in_dim, width, 1)
            for in_dim, width in zip(in_channels[:3], widths[:3], strict=True)
        )
        in_dims = widths[1], widths[2], in_channels[3]
        self.expands = nn.ModuleList(
            PatchExpanding(in_dim, width) for in_dim, width in zip(in_dims, widths[:3], strict=True)
        )
        self.stages = nn.ModuleList(
            DecoderStage(width, rates[i], window, skip, everywhere) for i, width in enumerate(widths[:3])
        )
        self.norm = LayerNorm2d(channels, eps=1e-5)
        self.expand = PatchExpanding(channels, channels, 4)
        self.classifier = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.apply(init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[3]
        for i in (2, 1, 0):
            skip = self.laterals[i](maps[i])
            H, W = skip.shape[2:]
            x = self.stages[i](self.expands[i](x)[..., :H, :W], skip)
        return self.classifier(self.expand(self.norm(x)))
