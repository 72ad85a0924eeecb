"""Encoding of an image's visible patches alone, for masked autoencoders with ViT-shaped nets."""

from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbone import run_block
from models.masking import take
from models.plain import Block, PlainBackbone
from ops.attention.full import FullAttention


class VisibleTokens(nn.Module):
    """Encoder of a part of the patches by a ViT-shaped net, ours or timm's.

    The net is not a part of this module. Its positions become sines and cosines that are not trained, as in MAE
    (arXiv:2111.06377, appendix A.1).

    Args:
        net: `PlainBackbone` with full attention, or timm's `VisionTransformer`.

    Attributes:
        extra: Number of tokens before those of the patches, such as the class token.
        grid: Number of rows and columns of patches.

    Raises:
        ValueError: The net is of another kind, or it has no positions.
    """

    def __init__(self, net: Any):
        super().__init__()
        if not is_plain(net) or net.pos_embed is None:
            raise ValueError(
                f"method=mae needs a ViT with full attention and learned positions, not {type(net).__name__}: such as "
                "model=deit, or model=timm model.name=vit_base_patch16_224"
            )
        self.ours = isinstance(net, PlainBackbone)
        self.extra: int = net.extra if self.ours else net.num_prefix_tokens
        self.grid: tuple[int, int] = net.patch_embed.grid_size
        self.visible: Tensor | None = None
        before = net.pos_embed.shape[1] - self.grid[0] * self.grid[1]
        net.pos_embed.requires_grad = False
        net.pos_embed.data.copy_(sincos_positions(self.grid, net.pos_embed.shape[2], before))
        if not self.ours:
            net.patch_drop.register_forward_hook(self._select)

    def forward(self, net: Any, image: Tensor, visible: Tensor) -> Tensor:
        """Return the final tokens (B, E + n, C) of the visible patches of images (B, in_chans, H, W).

        Args:
            net: The net that the module was made for.
            image: Images.
            visible: int64 (B, n), indices of the visible patches, row by row.
        """
        if self.ours:
            tokens, _ = net.embed(image)
            x, size = take_patches(tokens, visible, self.extra), (1, visible.shape[1])
            recompute = net.grad_checkpointing and torch.is_grad_enabled()
            for block in net.blocks:
                x = run_block(block, x, size, recompute=recompute, losses=None)
            return net.finish(x)
        self.visible = visible
        try:
            return net.forward_features(image)
        finally:
            self.visible = None

    def _select(self, module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor | None:
        return None if self.visible is None else take_patches(tokens, self.visible, self.extra)


def is_plain(net: Any) -> bool:
    """Tell whether a net's blocks take any part of the tokens: full attention without terms that depend on places."""
    if isinstance(net, PlainBackbone):
        blocks: Any = net.blocks
        return net.block is Block and all(isinstance(b.mixer, FullAttention) and b.mixer.lepe is None for b in blocks)
    return isinstance(net, VisionTransformer)


def take_patches(tokens: Tensor, index: Tensor, extra: int) -> Tensor:
    """Return the first `extra` tokens and those at `index` of the others.

    Args:
        tokens: (B, E + N, C).
        index: int64 (B, n), counted from the first token that is no extra one.
        extra: E.
    """
    return torch.cat([tokens[:, :extra], take(tokens[:, extra:], index)], dim=1)


def sincos_positions(grid: tuple[int, int], dim: int, extra: int) -> Tensor:
    """Return sines and cosines of the positions in a grid, (1, E + rows * columns, dim), with zeros for extra tokens.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sines and cosines of positions need a number of channels that 4 divides, not {dim}")
    return torch.cat([torch.zeros(extra, dim), build_sincos2d_pos_embed(list(grid), dim)])[None]
