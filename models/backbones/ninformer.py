"""NiNformer (Abdullah and Sun, 2024, arXiv:2403.02411).

Paper: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function. Written after the paper
and the authors' repository, Abdullah-88/NiNformer (BSD-3-Clause); its checkpoints load.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models import plain
from models.hierarchical import imagenet_cfg, init_as_pytorch
from ops.registry import Spec


class Block(nn.Module):
    """Token mixing and MLP behind one shared norm, each added to the tokens (B, H * W, C).

    Args:
        dim: Channels C.
        mixer: Op from (B, H, W, C) to the same shape.
        mlp_ratio: Hidden channels of the MLP relative to `dim`.
        drop_path: Drop path rate.
        eps: Epsilon of the norm.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mixer = mixer
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        mixed = self.mixer(self.norm(x).unflatten(1, tuple(size)), **context)
        x = x + self.drop_path(mixed.flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm(x)))


class NiNformer(plain.PlainBackbone):
    """ViT's layout with gating by a Mixer block, without positions, class token and final norm.

    Args:
        grid: Side of the grid of tokens for which the ops learn weights; on maps of other sizes they are interpolated.
        dim: Number of channels.
        patch: Side of a patch in pixels.
        depths: Number of blocks, as one entry.
        heads: Attention heads for `mixers` that have heads.
        mlp_ratio: Hidden units of all MLPs relative to `dim`.
        dropout: Dropout rate after each layer of all MLPs.
        mixers: Token mixers in place of the gating, as `ops.parse_mixers` reads them.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    block = Block
    positions = False
    eps = 1e-5
    own_prefixes = ("model.",)
    renames = (
        (r"^patcher\.", "patch_embed.proj."),
        (r"^classifier\.", "head."),
        (r"^model\.", "blocks."),
        (r"\.mgu\.", ".mixer."),
        (r"\.ffn\.net\.0\.", ".mlp.fc1."),
        (r"\.ffn\.net\.3\.", ".mlp.fc2."),
    )

    def __init__(
        self,
        grid: int = 8,
        dim: int = 256,
        patch: int = 4,
        depths: Sequence[int] = (4,),
        heads: int = 8,
        mlp_ratio: float = 2.0,
        dropout: float = 0.5,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        op = {"name": "network_in_network", "size": grid, "hidden": int(mlp_ratio * dim), "dropout": dropout}
        super().__init__(
            dim=dim,
            patch=patch,
            depths=depths,
            heads=heads,
            mlp_ratio=mlp_ratio,
            mixers=op if mixers is None else mixers,
            class_token=False,
            **kwargs,
        )
        self.norm = nn.Identity()
        blocks: Any = self.blocks
        for block in blocks:
            block.mlp.drop1.p = block.mlp.drop2.p = dropout
        self.apply(init_as_pytorch)


default_cfgs = generate_default_cfgs(
    {
        "ninformer_cifar": imagenet_cfg(
            input_size=(3, 32, 32),
            pool_size=None,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            crop_pct=1.0,
            first_conv="patch_embed.proj",
        )
    }
)


@register_model
def ninformer_cifar(pretrained: bool = False, **kwargs) -> NiNformer:
    return NiNformer.build("ninformer_cifar", pretrained, **kwargs)
