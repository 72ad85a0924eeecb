"""Renames of weights for timm's nets: from the authors' names, where timm's own filters do not know them."""

import re
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from timm.models.focalnet import Downsample, FocalNet
from torch import Tensor, nn

from retinue.utils.arithmetic import padding

# Renames are applied in order. Each is a regular expression and what replaces every match in a weight's name, as in
# `re.sub`. None in place of the replacement drops the weight if its name has a match.
Renames = Sequence[tuple[str, str | Callable[[re.Match], str] | None]]


def _next_stage(match: re.Match) -> str:
    """Name the next stage's downsampling, which the authors keep at the end of the stage before."""
    return f"stages.{int(match[1]) + 1}.downsample."


def _block(match: re.Match) -> str:
    """Name a block of EfficientViT or SHViT, such as `blocks2.5.`.

    The authors' later stages begin with three layers of downsampling, which are no blocks in timm.
    """
    stage, layer = int(match[1]) - 1, int(match[2])
    return f"stages.{stage}.blocks.{layer - 3 if stage else layer}."


# Renames by the name of the class of timm's net.
RENAMES: dict[str, Renames] = {
    "CrossVit": ((r"^(pos_embed|cls_token)\.(\d)$", r"\1_\2"),),
    "EfficientVitMsra": (
        (r"\.attention_bias_idxs$", None),
        (r"^patch_embed\.(\d)\.", lambda match: f"patch_embed.conv{int(match[1]) // 2 + 1}."),
        (r"^blocks(\d)\.((?<=1\.)\d|[3-9]|\d\d)\.", _block),
        (r"^blocks([23])\.0\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.res1."),
        (r"^blocks([23])\.1\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.patchmerge."),
        (r"^blocks([23])\.2\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.res2."),
        (r"\.c\.", ".conv."),
        (r"^head\.l\.", "head.linear."),
    ),
    "GlobalContextVit": (
        (r"\.relative_position_index$", None),
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^patch_embed\.conv_down\.", "stem.down."),
        (r"^levels\.(\d)\.downsample\.", _next_stage),
        (r"\.q_global_gen\.to_q_global\.(\d)\.", lambda match: f".global_block.blocks.conv{int(match[1]) + 1}."),
        (r"(\.down|\.downsample)\.conv\.", r"\1.conv_block.conv."),
        (r"\.conv\.0\.", ".conv_dw."),
        (r"\.conv\.2\.fc\.0\.", ".se.fc1."),
        (r"\.conv\.2\.fc\.2\.", ".se.fc2."),
        (r"\.conv\.3\.", ".conv_pw."),
        (r"^levels\.", "stages."),
        (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^norm\.", "stages.3.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ),
    # The names of timm's `features_only=True`.
    "MaxxVit": ((r"^stages_(\d)\.", r"stages.\1."),),
    "SHViT": (
        (r"^blocks(\d)\.((?<=1\.)\d|[3-9]|\d\d)\.", _block),
        (r"^blocks([23])\.0\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
        (r"^blocks([23])\.1\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.2."),
        (r"^blocks([23])\.2\.(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.{int(match[2]) + 3}."),
    ),
}


def pad_to_whole_patches(net: nn.Module) -> None:
    """Let a FocalNet take images of any size: zeros on the right and at the bottom complete the patches of each stage.

    The authors' detection code does the same. Other nets are left as they are.
    """

    def pad(patches: Downsample, args: tuple[Tensor]) -> Tensor:
        H, W = args[0].shape[2:]
        return F.pad(args[0], (0, padding(W, patches.stride), 0, padding(H, patches.stride)))

    if isinstance(net, FocalNet):
        for module in net.modules():
            if isinstance(module, Downsample):
                module.register_forward_pre_hook(pad)
