"""Labels of mixed images by the attention of the class token: TransMix and MixPro's progressive attention labelling.

TransMix: Chen et al., CVPR 2022, arXiv:2111.09833. MixPro: Zhao et al., ICLR 2023, arXiv:2304.12043. Written after the
papers and the authors' repositories, Beckschen/TransMix (Apache-2.0) and fistyee/MixPro (MIT).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.mixing import Mix, smooth_labels
from models.plain import PlainBackbone
from models.reduction.blocks import ReducedBlock
from ops.attention.full import FullAttention

KINDS = ("transmix", "mixpro")
# Keys of a recipe's augmentation that mix images
MIXES = ("mixup", "cutmix", "maskmix")


def check_attention(model: nn.Module, kind: str, augment: Mapping) -> None:
    """Check that a net hands out the attention of its class token, and that a recipe mixes images.

    Args:
        model: The net.
        kind: transmix or mixpro.
        augment: The recipe's augmentation.

    Raises:
        ValueError: `kind` is unknown, the net has no class token, its last op is not full attention, it merges or drops
            tokens, or the recipe does not mix images in the way that `kind` is for.
    """
    if kind not in KINDS:
        raise ValueError(f"task.mixed_labels must be one of {', '.join(KINDS)} or null, not {kind!r}")
    if not (isinstance(model, PlainBackbone) and model.extra and type(last_op(model)) is FullAttention):
        raise ValueError(
            f"task.mixed_labels={kind} needs a plain net with a class token and full attention in its last block, such "
            "as model=deit or model=lvvit"
        )
    if isinstance(model.blocks[-1], ReducedBlock):
        raise ValueError(f"task.mixed_labels={kind} needs a net that keeps all tokens: model.reduction=null")
    needed, example = (("maskmix",), "maskmix={cell: 56}") if kind == "mixpro" else (MIXES, "cutmix=1")
    if not any(augment.get(key) for key in needed):
        raise ValueError(f"task.mixed_labels={kind} needs mixed images, such as recipe.augment.{example}")


def last_op(model: PlainBackbone) -> nn.Module:
    """Return the op of a net's last block."""
    return model.blocks[-1].get_submodule("mixer")


def attended_share(mix: Mix, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the share of the class token's attention that an image's own patches receive, (B,).

    Args:
        mix: How the images were mixed; a patch is an image's own if its first pixel is, as in the authors' code.
        attention: Attention of the class token to the map's tokens, (B, N).
        grid: Rows and columns of the map's tokens.
    """
    own = F.interpolate(mix.own, grid, mode="nearest").flatten(1)
    return (own * attention).sum(1) / attention.sum(1)


def attention_targets(
    kind: str, mix: Mix, label: Tensor, target: Tensor, logits: Tensor, attention: Tensor, smoothing: float
) -> Tensor:
    """Return the targets of mixed images, (B, K).

    TransMix: smoothed labels, whose share is the mean of the area's and of the attention's. MixPro, for images that
    MaskMix mixed: labels without smoothing, whose share moves from the area's to the attention's as far as the
    prediction agrees with the area's target; the gradient flows through this agreement, as in the authors' code. Other
    images of MixPro keep the area's target.

    Args:
        kind: transmix or mixpro.
        mix: How the images were mixed.
        label: Labels of the images (B,).
        target: Smoothed targets by area (B, K).
        logits: Predictions (B, K).
        attention: Share of the attention that an image's own patches receive, (B,).
        smoothing: Share of a label that is spread over all classes.
    """
    if mix.kind is None or (kind == "mixpro" and mix.kind != "maskmix"):
        return target
    if kind == "transmix":
        share, smooth = (mix.share + attention) / 2, smooth_labels(label, target.shape[1], smoothing)
    else:
        agreement = torch.cosine_similarity(target, logits.float().softmax(1), dim=1)
        share = agreement * attention + (1 - agreement) * mix.share
        smooth = smooth_labels(label, target.shape[1], 0.0)
    return share[:, None] * smooth + (1 - share[:, None]) * smooth[mix.partner]
