"""Upsamplers of decoders: they bring a coarse map to the size of the skip map of twice its resolution.

Every upsampler is built from (skip_dim, deep_dim), the numbers of channels of the skip map and of the coarse map, and
called with (skip, deep), maps (B, skip_dim, H, W) and (B, deep_dim, ⌈H / 2⌉, ⌈W / 2⌉). It returns a map
(B, skip_dim, H, W).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp, trunc_normal_
from torch import Tensor, nn

from ops.functional import biased_scores_attention, merge_heads, split_heads
from ops.windows import from_windows, pad_to_multiple, to_windows
from retinue.utils.arithmetic import ceil_div
from retinue.utils.suggestions import nearest

# Channels of an attention head.
HEAD_DIM = 32


class BilinearUpsample(nn.Module):
    """Bilinear upsampling of the coarse map, projected to the skip map's channels; the skip map gives the size only."""

    def __init__(self, skip_dim: int, deep_dim: int):
        super().__init__()
        self.project = nn.Conv2d(deep_dim, skip_dim, 1)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        # A projection before the upsampling gives the same as one after it.
        return crop_as(F.interpolate(self.project(deep), scale_factor=2, mode="bilinear"), skip)


class PatchExpand(nn.Module):
    """A linear layer turns each position of the coarse map into 2 x 2 positions, and a LayerNorm follows.

    Paper: Swin-Unet: Unet-like Pure Transformer for Medical Image Segmentation (Cao et al., ECCV Workshops 2022,
    arXiv:2105.05537), written after its text.
    """

    def __init__(self, skip_dim: int, deep_dim: int, factor: int = 2):
        super().__init__()
        self.expand = nn.Conv2d(deep_dim, factor**2 * skip_dim, 1, bias=False)
        self.shuffle = nn.PixelShuffle(factor)
        self.norm = LayerNorm2d(skip_dim)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        return crop_as(self.enlarge(deep), skip)

    def enlarge(self, deep: Tensor) -> Tensor:
        """Enlarge a map (B, deep_dim, H, W) to (B, skip_dim, factor * H, factor * W)."""
        return self.norm(self.shuffle(self.expand(deep)))


class WindowAttentionUpsample(BilinearUpsample):
    """Window attention upsample, WAU: an attention decoder on the skip map, added to bilinear upsampling.

    Paper: More than Encoder: Introducing Transformer Decoder to Upsample (Li et al., ICPR 2022, arXiv:2106.10637),
    written after its abstract; there is no public code. The numbers of heads and of layers, the windows' size and the
    learned bias are ours.

    Each position of the skip map is a query, and its keys and values are the positions of the coarse map in the window
    that covers the same part of the image: windows of 2w x 2w queries and w x w keys. So every position mixes coarse
    positions by weights that follow from the content. Norms come before attention and MLP, and each is added to its
    input, the skip map. Windows shrink to the sides of a smaller map. Windows that reach beyond the map hold fewer
    positions.

    Args:
        skip_dim: Number of channels of the skip map.
        deep_dim: Number of channels of the coarse map.
        window: Side w of a window in positions of the coarse map.
        mlp_ratio: Hidden channels of the MLP relative to `skip_dim`.
    """

    def __init__(self, skip_dim: int, deep_dim: int, window: int = 7, mlp_ratio: float = 4.0):
        super().__init__(skip_dim, deep_dim)
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self.window, self.num_heads = window, max(1, round(skip_dim / HEAD_DIM))
        width = HEAD_DIM * self.num_heads
        self.norm_skip, self.norm_deep, self.norm_mlp = (nn.LayerNorm(dim) for dim in (skip_dim, deep_dim, skip_dim))
        self.q, self.kv = nn.Linear(skip_dim, width), nn.Linear(deep_dim, 2 * width)
        self.proj = nn.Linear(width, skip_dim)
        self.mlp = Mlp(skip_dim, round(mlp_ratio * skip_dim))
        # Bias of each offset from twice the key's position in its window to the query's position.
        self.position_bias = nn.Parameter(torch.empty(self.num_heads, 4 * window - 2, 4 * window - 2))
        trunc_normal_(self.position_bias, std=0.02)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        x = skip.permute(0, 2, 3, 1)
        x = x + self.proj(self.attend(self.q(self.norm_skip(x)), self.kv(self.norm_deep(deep.permute(0, 2, 3, 1)))))
        x = x + self.mlp(self.norm_mlp(x))
        return x.permute(0, 3, 1, 2) + super().forward(skip, deep)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Compute attention from queries (B, H, W, D) to keys and values (B, ⌈H / 2⌉, ⌈W / 2⌉, 2D): (B, H, W, D)."""
        (H, W), (h, w) = q.shape[1:3], kv.shape[1:3]
        window = (min(self.window, h), min(self.window, w))
        grid = (ceil_div(h, window[0]), ceil_div(w, window[1]))
        q, kv = pad_to_multiple(q, (2 * window[0], 2 * window[1])), pad_to_multiple(kv, window)
        bias = self.bias(window)
        if kv.shape[1:3] != (h, w):
            on_map = pad_to_multiple(bias.new_ones(1, h, w, 1), window)
            hidden = to_windows(on_map, grid)[0].transpose(1, 2) == 0  # (P, 1, M)
            bias = bias + torch.zeros_like(hidden, dtype=bias.dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)
        # (B, P, heads, tokens, D)
        queries, keys, values = (split_heads(to_windows(t, grid), self.num_heads) for t in (q, *kv.chunk(2, dim=-1)))
        out = biased_scores_attention(queries, keys, values, bias, HEAD_DIM**-0.5)
        return from_windows(merge_heads(out), grid, q.shape[1:3])[:, :H, :W]

    def bias(self, window: tuple[int, int]) -> Tensor:
        """Return the bias of the queries and keys of a window of h x w keys: (heads, 4 * h * w, h * w)."""
        rows, columns = (
            torch.arange(2 * side, device=self.position_bias.device).unsqueeze(1)
            - 2 * torch.arange(side, device=self.position_bias.device)
            + 2 * (self.window - 1)
            for side in window
        )
        bias = self.position_bias[:, rows[:, None, :, None], columns[None, :, None, :]]  # (heads, 2h, 2w, h, w)
        return bias.flatten(3).flatten(1, 2)


# Values of a decoder's argument `upsample`.
UPSAMPLERS: dict[str, Callable[..., nn.Module]] = {
    "bilinear": BilinearUpsample,
    "expand": PatchExpand,
    "wau": WindowAttentionUpsample,
}


def create_upsample(name: str, skip_dim: int, deep_dim: int) -> nn.Module:
    """Create the upsampler of a name.

    Args:
        name: "bilinear", "expand" or "wau".
        skip_dim: Number of channels of the skip map and of the result.
        deep_dim: Number of channels of the coarse map.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in UPSAMPLERS:
        raise ValueError(f"upsample must be {', '.join(UPSAMPLERS)}, not {name!r}.{nearest(name, UPSAMPLERS)}")
    return UPSAMPLERS[name](skip_dim, deep_dim)


def crop_as(x: Tensor, like: Tensor) -> Tensor:
    """Crop a map to the height and width of another at the bottom and on the right."""
    return x[..., : like.shape[-2], : like.shape[-1]]
