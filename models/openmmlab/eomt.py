"""EoMT: the last blocks of a plain ViT process queries beside the patches, and each query predicts a mask and a class.

Paper: Your ViT is Secretly an Image Segmentation Model (Kerssies et al., CVPR 2025, arXiv:2503.19108), written after
its text and the authors' repository, https://github.com/tue-mps/eomt (MIT). The losses and the scores are those of
mmsegmentation's Mask2Former.

`models.openmmlab.config.library` imports this module, which puts both classes into mmsegmentation's registry.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import TASK_UTILS
from mmengine.model import BaseModule
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads import Mask2FormerHead
from mmseg.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import VisionTransformer
from torch import Tensor, nn

from models.backbone import run_block
from models.dense import DenseBackbone
from models.plain import Block, PlainBackbone
from ops.attention.full import FullAttention
from retinue.utils.arithmetic import ceil_div, padding

# Exponent of the fall of the probability with which a block masks its queries' attention.
ANNEALING_POWER = 0.9
# Arguments of Mask2Former's head in the fitted config that EoMT has no use for: it has no decoders, and one map.
UNUSED = {
    "in_index", "feat_channels", "out_channels", "num_transformer_feat_level", "pixel_decoder",
    "enforce_decoder_input_project", "positional_encoding", "transformer_decoder",
}  # fmt: skip
NEEDED = "EoMT needs a plain ViT, such as model=deit or timm's vit_small_patch16_224"


@MODELS.register_module()
class EoMT(EncoderDecoder):
    """Plain net whose last blocks are those of the head's queries too.

    Raises:
        ValueError: The backbone is no plain ViT or has too few blocks, or the last blocks are no usual blocks with full
            attention.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        net, count = self.backbone.net, self.decode_head.num_blocks
        if not isinstance(net, PlainBackbone | VisionTransformer):
            raise ValueError(f"{NEEDED}, not {type(net).__name__}")
        blocks: Any = net.blocks
        if not 0 < count < len(blocks):
            raise ValueError(f"decode_head.num_blocks must be from 1 to {len(blocks) - 1}, not {count}")
        last = blocks[-count:] if isinstance(net, PlainBackbone) else []
        if any(type(block) is not Block or type(block.mixer) is not FullAttention for block in last):
            raise ValueError(f"EoMT masks the attention of the last {count} blocks, whose op must be full")

    def extract_feat(self, inputs: Tensor) -> tuple[DenseBackbone, Tensor]:
        """Return what the head reads: the backbone, whose blocks the head runs, and the images (B, C, H, W)."""
        return self.backbone, inputs


@MODELS.register_module()
class EoMTHead(Mask2FormerHead):
    """Queries, and their predictions of masks and classes before each of the last blocks and after them.

    In training, a query attends only to the patches of the mask that it predicts before the block. The query of a block
    is masked with a probability that falls from 1 to 0 in the course of the training, in one block after another
    (mask annealing, section 3.3). So evaluation needs no masks, and the net runs as a plain ViT.

    Args:
        in_channels: Number of channels of the backbone's map, as a list of one entry.
        strides: Stride of this map in pixels, as a list of one entry.
        num_classes: Number of classes.
        num_queries: Number of queries.
        num_blocks: Number of last blocks that process the queries. The paper has 3 for ViT-S and B, 4 for L, 5 for g.
        loss_cls: Config of the loss of the classes, the last of which is "no object".
        loss_mask: Config of the binary cross-entropy of the masks.
        loss_dice: Config of the dice loss of the masks.
        train_cfg: Configs of the assigner and the sampler, and the numbers of sampled points.
        align_corners: False.
        mask2former: Arguments of Mask2Former's head that this head has no use for (`UNUSED`).

    Raises:
        ValueError: The backbone has several maps.
        TypeError: An argument is unknown.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        num_queries: int = 100,
        num_blocks: int = 4,
        loss_cls: Any,
        loss_mask: Any,
        loss_dice: Any,
        train_cfg: Any,
        align_corners: bool = False,
        **mask2former: Any,
    ):
        for name in mask2former.keys() - UNUSED:
            raise TypeError(f"EoMTHead.__init__() got an unexpected keyword argument {name!r}")
        if len(in_channels) != 1:
            raise ValueError(f"{NEEDED}, not a net with {len(in_channels)} maps")
        # The constructor of Mask2Former's head would create its decoders.
        BaseModule.__init__(self)
        self.num_classes = self.out_channels = num_classes
        self.num_queries, self.num_blocks = num_queries, num_blocks
        self.align_corners, self.ignore_index = align_corners, 255
        self.assigner = TASK_UTILS.build(train_cfg["assigner"])
        self.sampler = TASK_UTILS.build(train_cfg["sampler"], default_args={"context": self})
        self.num_points = train_cfg["num_points"]
        self.oversample_ratio = train_cfg["oversample_ratio"]
        self.importance_sample_ratio = train_cfg["importance_sample_ratio"]
        self.class_weight = loss_cls["class_weight"]
        self.loss_cls, self.loss_mask, self.loss_dice = map(MODELS.build, (loss_cls, loss_mask, loss_dice))

        (dim,), (stride,) = in_channels, strides
        self.query_feat = nn.Embedding(num_queries, dim)
        self.cls_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        doublings = max(1, int(math.log2(stride)) - 2)
        self.upscale = nn.Sequential(*(layer for _ in range(doublings) for layer in upscaling(dim)))
        self.mask_stride = stride / 2**doublings
        self.set_progress(0.0)

    def init_weights(self) -> None:
        """Leave the weights as the constructor initialises them; Mask2Former's method is for its own decoders."""

    def set_progress(self, share: float) -> None:
        """Set the probabilities of masks, one for each block, after this share of the training's steps."""
        progress = [min(max(share * (self.num_blocks + 2) - i - 1, 0.0), 1.0) for i in range(self.num_blocks)]
        self.mask_probabilities = [(1 - value) ** ANNEALING_POWER for value in progress]

    def forward(self, x: tuple[DenseBackbone, Tensor], batch_data_samples: Any = None) -> tuple[list, list]:
        """Predict scores (B, Q, K + 1) and masks (B, Q, h, w), each as a list with one entry for each prediction.

        There is one prediction before each of the last blocks, in training only, and one after them.

        Args:
            x: The backbone and the images (B, C, H, W).
            batch_data_samples: Not used; the package passes it.
        """
        backbone, image = x
        net: Any = backbone.net
        blocks: Any = net.blocks
        H, W = image.shape[2:]
        image = F.pad(image, (0, padding(W, backbone.multiple), 0, padding(H, backbone.multiple)))
        tokens, size = first_tokens(net, image, len(blocks) - self.num_blocks)
        tokens = torch.cat([self.query_feat.weight.expand(len(image), -1, -1), tokens], dim=1)
        # Our blocks also need the size of the map.
        arguments, keyword = ((size,), "mask") if isinstance(net, PlainBackbone) else ((), "attn_mask")
        recompute = net.grad_checkpointing and torch.is_grad_enabled()

        outputs = []
        for block, probability in zip(blocks[-self.num_blocks :], self.mask_probabilities, strict=True):
            masks = {}
            if self.training:
                outputs.append(self.predictions(net.norm(tokens), size))
                masks = {keyword: self.attention_mask(outputs[-1][1], tokens.shape[1], size, probability)}
            tokens = run_block(block, tokens, *arguments, recompute=recompute, losses=None, **masks)
        outputs.append(self.predictions(net.norm(tokens), size))
        h, w = (ceil_div(side, round(self.mask_stride)) for side in (H, W))
        return [scores for scores, _ in outputs], [masks[..., :h, :w] for _, masks in outputs]

    def predictions(self, tokens: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the scores (B, Q, K + 1) and the masks' logits (B, Q, h, w) of the queries among normalised tokens."""
        queries, patches = tokens[:, : self.num_queries], tokens[:, -size[0] * size[1] :]
        features = self.upscale(patches.transpose(1, 2).unflatten(2, size))
        return self.cls_embed(queries), torch.einsum("bqc,bchw->bqhw", self.mask_embed(queries), features)

    def attention_mask(self, masks: Tensor, tokens: int, size: tuple[int, int], probability: float) -> Tensor:
        """Return for each pair of tokens whether the first attends to the second, (B, 1, N, N) bool.

        Args:
            masks: Logits of the masks (B, Q, h, w).
            tokens: Number of tokens N: queries, extra tokens of the net, and the map.
            size: Height and width of the map.
            probability: Probability that a query is masked.
        """
        inside = F.interpolate(masks, size, mode="bilinear").flatten(2) > 0
        unmasked = torch.rand(inside.shape[:2], device=inside.device) >= probability
        allowed = inside.new_ones(len(inside), tokens, tokens)
        allowed[:, : self.num_queries, -inside.shape[2] :] = inside | unmasked[..., None]
        return allowed[:, None]


def upscaling(dim: int) -> list[nn.Module]:
    """Return the layers that double the sides of a map (B, dim, h, w)."""
    return [
        nn.ConvTranspose2d(dim, dim, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        LayerNorm2d(dim),
    ]


def first_tokens(net: Any, image: Tensor, blocks: int) -> tuple[Tensor, tuple[int, int]]:
    """Run the first `blocks` blocks of a plain net.

    Returns:
        The tokens (B, E + H * W, C), of which the first E are the net's extra tokens, and (H, W).
    """
    if isinstance(net, PlainBackbone):
        _, [tokens], [size] = net.run(image, [blocks - 1], blocks)
        return tokens, size
    [result] = net.forward_intermediates(
        image,
        indices=[blocks - 1],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    patches, *extra = result if isinstance(result, tuple) else (result,)
    height, width = net.patch_embed.patch_size
    return torch.cat([*extra, patches], dim=1), (image.shape[2] // height, image.shape[3] // width)
