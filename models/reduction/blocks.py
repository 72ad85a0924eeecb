"""Blocks of ViT-shaped nets, ours and timm's, in which a reduction merges or drops tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn

from models import plain
from models.reduction.groups import ForwardPass, Groups
from models.reduction.registry import Attended, Reduction
from ops.attention.full import FullAttention
from ops.functional import merge_heads, split_heads


class ReducedBlock(nn.Module):
    """A block that has taken over the layers of another block, so that the names of the weights stay.

    Args:
        block: The other block.
        index: Index of the block in the net.
        extra: Number of extra tokens E, which are never reduced.
        reduction: Reduction of the net.
        forward_pass: Values that the net's blocks share.
        last: Whether the block is the last one of the net.
    """

    norm1: Any
    norm2: Any
    mlp: Any

    def __init__(
        self, block: nn.Module, index: int, extra: int, reduction: Reduction, forward_pass: ForwardPass, last: bool
    ):
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.train(block.training)
        self.index, self.extra, self.reduction, self.forward_pass = index, extra, reduction, forward_pass
        self.first = index == min(reduction.reduce_at)
        self.restores = last and reduction.restores

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Return tokens (B, E + m, C) for tokens (B, E + n, C); if the whole map is asked for, m = n = H * W."""
        E, groups = self.extra, self.forward_pass.groups
        if self.first:
            groups.clear()
            groups[self.index] = Groups.of_one(x[:, E:])
        now, before = groups[self.index], None
        if self.forward_pass.whole:
            before, x = x[:, E:], torch.cat([x[:, :E], now.select(x[:, E:])], dim=1)
        counts = now.counts() if self.reduction.proportional and not now.all_of_one else None
        mixed, attended = self.attend(self.norm1(x), counts)
        x = self.add_mixed(x, mixed)
        if self.reduction.after == "attention":
            x, now, before = self.reduce(x, attended, now, before)
        x = self.add_mlp(x)
        if self.reduction.after == "block":
            x, now, before = self.reduce(x, attended, now, before)
        groups[self.index + 1] = now
        if before is None and not self.restores:
            return x
        return torch.cat([x[:, :E], now.restore(x[:, E:], before)], dim=1)

    def reduce(
        self, x: Tensor, attended: Attended, groups: Groups, before: Tensor | None
    ) -> tuple[Tensor, Groups, Tensor | None]:
        """Reduce the tokens if the block is one of those that do.

        Args:
            x: Tokens (B, E + n, C).
            attended: Attention of the block.
            groups: Groups of the tokens.
            before: Earlier tokens of the whole map (B, N, C), if the whole map is asked for.

        Returns:
            The tokens, their groups, and the current tokens of the whole map, whose values dropped tokens keep.
        """
        if self.index not in self.reduction.reduce_at:
            return x, groups, before
        E, number = self.extra, list(self.reduction.reduce_at).index(self.index)
        if before is not None:
            before = groups.restore(x[:, E:], before)
        step = self.reduction.reduce(x[:, E:], attended, groups, number)
        return torch.cat([x[:, :E], step.tokens], dim=1), groups.after(step), before

    def attend(self, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Attended]:
        """Return the output of the attention for normalised tokens (B, E + n, C), and the attention itself.

        Args:
            x: Tokens.
            counts: How often each token of the map counts, (B, n), or None for once.
        """
        raise NotImplementedError

    def add_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the output of the attention to the tokens."""
        raise NotImplementedError

    def add_mlp(self, x: Tensor) -> Tensor:
        """Add the output of the MLP to the tokens."""
        raise NotImplementedError

    def bias(self, counts: Tensor | None, like: Tensor) -> Tensor | None:
        """Return what is added to the products of queries and keys, (B, 1, 1, E + n), or None."""
        if counts is None:
            return None
        exact = torch.promote_types(counts.dtype, like.dtype)
        return F.pad(counts.to(exact).log(), (self.extra, 0))[:, None, None].to(like.dtype)


class PlainReducedBlock(ReducedBlock):
    """Block of `models.plain` with full attention."""

    mixer: Any
    drop_path: Any

    def __init__(self, block: Any, *args: Any, **kwargs: Any):
        super().__init__(block, *args, **kwargs)
        self.branch_scale = block.branch_scale

    @staticmethod
    def takes(block: Any) -> bool:
        """Tell whether this class computes what the block does."""
        if type(block) is not plain.Block or type(block.mixer) is not FullAttention:
            return False
        # A convolution, a bias by position and an auxiliary loss need the whole map.
        return block.mixer.lepe is None and block.mixer.softmax.bias is None and not block.mixer.loss_weights

    def attend(self, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Attended]:
        q, k, v = (split_heads(t, self.mixer.num_heads) for t in self.mixer.qkv(x).chunk(3, dim=-1))
        scale = self.mixer.softmax.scale(k.shape[-2])
        out = F.scaled_dot_product_attention(q, k, v, self.bias(counts, q), scale=scale)
        return self.mixer.proj(merge_heads(out)), Attended(q, k, out, scale, self.extra)

    def add_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:
        return torch.add(x, self.drop_path(mixed), alpha=self.branch_scale)

    def add_mlp(self, x: Tensor) -> Tensor:
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=self.branch_scale)


class TimmReducedBlock(ReducedBlock):
    """Block of timm's VisionTransformer with its standard attention."""

    attn: Any
    ls1: Any
    ls2: Any
    drop_path1: Any
    drop_path2: Any

    @staticmethod
    def takes(block: Any) -> bool:
        """Tell whether this class computes what the block does."""
        return type(block) is vision_transformer.Block and type(block.attn) is vision_transformer.Attention

    def attend(self, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Attended]:
        attn = self.attn
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        dropout = attn.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, self.bias(counts, q), dropout, scale=attn.scale)
        mixed = attn.norm(merge_heads(out))
        if attn.gate is not None:
            mixed = mixed * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(mixed)), Attended(q, k, out, attn.scale, self.extra)

    def add_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(mixed))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


BLOCKS = (PlainReducedBlock, TimmReducedBlock)
