"""DCAL: Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification.

Zhu et al., CVPR 2022, arXiv:2205.02151. Written after the paper; its authors have published no code. Two branches join
those of DeiT: global-local cross-attention (GLCA), in which the tokens that matter most for the class token attend to
the whole image once more, and, in training only, pair-wise cross-attention (PWCA), in which an image also attends to
another image of the batch, so that it cannot rely on details of its own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models import plain
from models.backbone import Backbone, run_block
from models.backbones.deit import DeiT, deit_cfg
from models.hierarchical import init_weights
from ops.attention.full import FullAttention
from ops.functional import merge_heads, split_heads
from ops.losses import Losses


class Block(plain.Block):
    """ViT's block, which also returns its attention, or attends to a second image."""

    def forward(self, x: Tensor, size: Sequence[int], branch: str | None = None, **context) -> Any:
        """Return the tokens (B, E + N, C).

        Args:
            x: Tokens (B, E + N, C).
            size: Size (H, W) of the map.
            branch: "rollout" also returns the attention, the mean over the heads without gradient, (B, E + N, E + N).
                In "pairs" the keys and values of image i + B // 2 join those of image i, the last images' partners
                being the first images.
            context: Further arguments of the op.
        """
        if branch is None:
            return super().forward(x, size, **context)
        mixer: Any = self.mixer
        q, k, v = split_heads(mixer.qkv(self.norm1(x)), 3 * mixer.num_heads).chunk(3, dim=1)
        attention = None
        if branch == "pairs":
            k, v = (torch.cat([t, t.roll(-(len(t) // 2), 0)], dim=2) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, scale=mixer.softmax.scale(k.shape[2]))
        else:
            weights = (q * mixer.softmax.scale(k.shape[2]) @ k.transpose(-2, -1)).softmax(-1)
            mixed, attention = weights @ v, weights.detach().mean(1)
        x = self.add(x, mixer.proj(merge_heads(mixed)))
        x = self.add(x, self.mlp(self.norm2(x)))
        return x if attention is None else (x, attention)


class LocalBlock(nn.Module):
    """Global-local cross-attention: some tokens attend to all, then an MLP follows.

    Args:
        dim: Channels C.
        heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP relative to `dim`.
        eps: Epsilon of the norms.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the tokens (B, n, C) at `index`, int64 (B, n), of x (B, N, C)."""
        tokens = self.norm1(x)
        chosen = index[..., None].expand(-1, -1, x.shape[2])
        q = split_heads(self.q(tokens.gather(1, chosen)), self.heads)
        k, v = split_heads(self.kv(tokens), 2 * self.heads).chunk(2, dim=1)
        out = x.gather(1, chosen) + self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return out + self.mlp(self.norm2(out))


class DCAL(DeiT):
    """DeiT with a second classifier, which reads the class token after global-local cross-attention.

    The scores are the logarithm of the mean of both classifiers' probabilities. With `branch_training` and in training,
    the scores are those of the branches, (3, B, num_classes): self-attention, GLCA and PWCA, whose losses `weigh`
    combines. Maps, as of `features_only`, are those of DeiT, whose weights load too.

    Args:
        local: Share of the map's tokens that attend in GLCA, above 0 and at most 1; 0.1 in fine-grained recognition and
            0.3 in re-identification.
        dim: As in `PlainBackbone`.
        heads: As in `PlainBackbone`.
        mlp_ratio: As in `PlainBackbone`.
        **kwargs: Further arguments of `PlainBackbone`; the ops must be "full".

    Attributes:
        branches: Names of the branches.
        branch_training: In training mode, return the scores of the branches.

    Raises:
        ValueError: `local` is out of its range, or an op is another one or has a bias, a convolution or a loss.
    """

    block = Block
    classifiers = ("head", "head_local")
    branches = ("global", "local", "pairs")
    branch_training = False
    head_local: nn.Module

    def __init__(self, local: float = 0.1, dim: int = 768, heads: int = 12, mlp_ratio: float = 4.0, **kwargs):
        super().__init__(dim=dim, heads=heads, mlp_ratio=mlp_ratio, distilled=False, **kwargs)
        if not 0 < local <= 1:
            raise ValueError(f"local must be a share of the tokens above 0 and at most 1, not {local}")
        for block in self.blocks:
            mixer: Any = block.get_submodule("mixer")
            plain_attention = type(mixer) is FullAttention and not mixer.diversity and mixer.lepe is None
            if not (plain_attention and mixer.softmax.bias is None and self.extra):
                raise ValueError("DCAL needs full attention without further parts in all blocks, and a class token")
        self.local = local
        self.local_block = LocalBlock(dim, heads, mlp_ratio, self.eps).apply(init_weights)
        self.local_norm = nn.LayerNorm(dim, eps=self.eps)
        # Logarithms of the variances of the branches' losses, which only a net in branch training has
        self.uncertainty: nn.Parameter | None = None
        self.unused_weights = self.unused_weights | {"uncertainty"}
        # DeiT's weights load, and then these keep their initial values.
        own = {key for key in self.state_dict() if key.startswith(("local_block.", "local_norm."))}
        self.optional_weights = own | {"uncertainty"}

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | (set() if self.uncertainty is None else {"uncertainty"})

    def set_branch_training(self) -> None:
        """Return the scores of the branches in training mode, and learn the uncertainty of their losses."""
        self.branch_training = True
        self.uncertainty = nn.Parameter(torch.zeros(len(self.branches)))

    def weigh(self, losses: Tensor) -> Tensor:
        """Return the loss of the branches' losses (3,): each divided by its learned variance (arXiv:1705.07115)."""
        assert self.uncertainty is not None
        return ((-self.uncertainty).exp() * losses + self.uncertainty).sum() / 2

    def map_tokens(self, features: Tensor) -> Tensor:
        return features[:, 2:]

    def forward_intermediates(self, x: Tensor, *args, intermediates_only: bool = False, **kwargs) -> Any:
        maps = super().forward_intermediates(x, *args, intermediates_only=True, **kwargs)
        return maps if intermediates_only else (self.forward_features(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.local_block, self.local_norm = nn.Identity(), nn.Identity()
        return take

    def forward_features(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        """Compute the final tokens (B, 2 + H * W, C): the class token, that of GLCA, and the map's."""
        return self.attend(*self.embed(x))

    def attend(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the final tokens (B, 2 + H * W, C) of the tokens (B, 1 + H * W, C) before the first block."""
        rollout = None
        for block in self.blocks:
            x, attention = self.run_branch(block, x, size, "rollout")
            # Half of what a token becomes is the token itself, by the residual connection (arXiv:2005.00928).
            step = (attention + torch.eye(x.shape[1], device=x.device, dtype=attention.dtype)) / 2
            rollout = step if rollout is None else step @ rollout
        assert rollout is not None
        count = math.ceil(self.local * (x.shape[1] - 1))
        chosen = 1 + rollout[:, 0, 1:].topk(count, dim=1).indices
        index = torch.cat([chosen.new_zeros(x.shape[0], 1), chosen], dim=1)
        local = self.local_norm(self.local_block(x, index))
        x = self.norm(x)
        return torch.cat([x[:, :1], local[:, :1], x[:, 1:]], dim=1)

    def run_branch(self, block: nn.Module, x: Tensor, size: Sequence[int], branch: str) -> Any:
        """Run a block in a branch, which is recomputed in the backward pass with gradient checkpointing."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        return run_block(block, x, size, branch, recompute=recompute, losses=None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = Backbone.forward_head(self, x, pre_logits=True)
        if pre_logits or not self.num_classes or pooled.ndim == 3:
            return pooled if pre_logits else self.head(pooled)
        scores = self.head(pooled), self.head_local(self.head_drop(x[:, 1]))
        return torch.logaddexp(*(s.log_softmax(-1) for s in scores)) - math.log(2)

    def forward(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        if not (self.training and self.branch_training):
            return super().forward(x, losses)
        tokens, size = self.embed(x)
        features, pairs = self.attend(tokens, size), tokens
        for block in self.blocks:
            pairs = self.run_branch(block, pairs, size, "pairs")
        class_tokens = features[:, 0], features[:, 1], self.norm(pairs)[:, 0]
        heads = self.head, self.head_local, self.head
        return torch.stack([head(self.head_drop(t)) for head, t in zip(heads, class_tokens, strict=True)])


default_cfgs = generate_default_cfgs(
    {f"dcal_{size}": deit_cfg("", classifier=DCAL.classifiers) for size in ("tiny", "small", "base")}
)


@register_model
def dcal_tiny(pretrained: bool = False, **kwargs) -> DCAL:
    return DCAL.build("dcal_tiny", pretrained, **{"dim": 192, "heads": 3} | kwargs)


@register_model
def dcal_small(pretrained: bool = False, **kwargs) -> DCAL:
    return DCAL.build("dcal_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def dcal_base(pretrained: bool = False, **kwargs) -> DCAL:
    return DCAL.build("dcal_base", pretrained, **kwargs)
