"""Ops of timm's nets compute the same as timm's modules with the same weights, on maps that timm's modules take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.davit import ChannelAttention
from timm.models.efficientvit_msra import ConvNorm, LocalWindowAttention
from timm.models.focalnet import FocalModulation
from timm.models.gcvit import FeatureBlock, GlobalContextVitBlock
from timm.models.ghostnet import GhostModuleV2
from timm.models.mambaout import GatedConvBlock
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from timm.models.shvit import SHSA, Conv2dNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import load_weights
from ops import create_op, create_ops

DIM, HEADS = 32, 2
# The weights of a timm module, and the module as a function on maps (B, H, W, C)
Case = tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]


def filled(module: nn.Module) -> Any:
    """Fill all weights with random values, because a weight that is initialised to zero would hide an error."""
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            value.normal_(std=0.2)
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return module.double().eval()


def channels_last(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Turn a module on (B, C, H, W) into a function on (B, H, W, C)."""
    return lambda x: module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def identity(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.eye(DIM), f"{name}.bias": torch.zeros(DIM)}


def channel() -> Case:
    module = filled(ChannelAttention(DIM, HEADS, qkv_bias=True))
    return module.state_dict(), lambda x: module(x.flatten(1, 2)).view_as(x)


def grid() -> Case:
    cfg = MaxxVitTransformerCfg(dim_head=DIM // HEADS, head_first=False, grid_size=(7, 7))
    module = filled(PartitionAttentionCl(DIM, partition_type="grid", cfg=cfg))
    return module.attn.state_dict(), module._partition_attn


def halo() -> Case:
    module = filled(HaloAttn(DIM, num_heads=HEADS, block_size=7, halo_size=3))
    return module.state_dict() | identity("proj"), channels_last(module)


def gated_conv() -> Case:
    module = filled(GatedConvBlock(DIM, norm_layer=nn.Identity))
    return module.state_dict(), lambda x: module(x) - x


def dfc() -> Case:
    module = filled(GhostModuleV2(DIM, DIM))
    # With identities, the gate multiplies the map itself
    module.primary_conv = module.cheap_operation = nn.Identity()
    layers = list(module.short_conv)
    states = [fuse_conv_bn_eval(*layers[i : i + 2]).state_dict() for i in (0, 2, 4)]
    gate = {f"gate.{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}
    return gate | identity("value") | identity("proj"), channels_last(module)


def folded(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's weights with batch norms folded into the convolutions before them, as linear layers."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, (ConvNorm, Conv2dNorm)):
            fused: Any = fuse_conv_bn_eval(layer[0], layer[1])  # pyright: ignore[reportArgumentType]
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.weight": fused.weight.squeeze((2, 3)), f"{name}.bias": fused.bias}
    return state


def focal_modulation() -> Case:
    module = filled(FocalModulation(DIM, focal_window=3, focal_level=2))
    state = module.state_dict()
    return state | {key: state[key].squeeze() for key in ("f.weight", "proj.weight")}, channels_last(module)


def cascaded_group() -> Case:
    module = filled(LocalWindowAttention(DIM, 16, HEADS, attn_ratio=1, kernels=(5, 3)))
    weights = {key.replace("proj.1.", "proj."): value for key, value in folded(module.attn).items()}
    return weights, channels_last(module)


def single_head() -> Case:
    module = filled(SHSA(DIM, qk_dim=16, pdim=8))
    return {key.replace("proj.1.", "proj."): value for key, value in folded(module).items()}, channels_last(module)


# Arguments with which the op is the one of the case
ARGUMENTS: dict[Callable[[], Case], dict[str, Any]] = {
    halo: {"block": 7},
    focal_modulation: {"kernels": (3, 5)},
    cascaded_group: {"kernels": (5, 3)},
    single_head: {"partial_ratio": 1 / 4},
}
ANY_SIZE = [channel, gated_conv, focal_modulation, cascaded_group, single_head]
CASES = [*ANY_SIZE, grid, halo, dfc]


@pytest.mark.parametrize(
    ("case", "size"),
    [*((case, (14, 28)) for case in CASES), *((case, (9, 16)) for case in ANY_SIZE)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_matches_timms_module(case, size):
    torch.manual_seed(0)
    op = create_op(case.__name__, DIM, HEADS, **ARGUMENTS.get(case, {})).double()
    weights, timm_module = case()
    load_weights(op, weights)
    x = torch.randn(2, *size, DIM, dtype=torch.float64)
    assert torch.allclose(op(x), timm_module(x), atol=1e-9)


def test_global_query_matches_timms_stage():
    torch.manual_seed(0)
    ops, contexts = create_ops(["global_query"] * 2, DIM, HEADS, stage=1, stride=8)
    assert contexts[0] is None
    features = filled(FeatureBlock(DIM, levels=2))
    contexts[1].double().features.load_state_dict(features.state_dict())
    x = torch.randn(2, 28, 28, DIM, dtype=torch.float64)
    query = channels_last(features)(x)
    for op, context, is_global in zip(ops, ({}, {"context": contexts[1](x)}), (False, True), strict=True):
        timm_block = filled(GlobalContextVitBlock(DIM, (28, 28), HEADS, use_global=is_global))
        load_weights(op.double(), timm_block.attn.state_dict())
        assert torch.allclose(op(x, **context), timm_block._window_attn(x, query), atol=1e-9)
