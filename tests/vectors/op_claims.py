"""Claims of ops: which op of ours must reproduce each reference vector, alone (`OPS`) or in a block or net (`PARTS`).

A new op's author adds a line for each of its vectors here.
"""

from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.backbones import lola_specvit
from models.backbones.hyper_zzw import SlowFastBlock
from models.enhancers import FeatEnHancer
from models.layers.attentive_pools import create_pool
from ops import Place, create_op
from ops.gate_registry import create_gate
from tests.vectors import cfsr
from tests.vectors.blocks import Block, LaMambaBlock, LocalRegionBlock, RegionLayer, TokenAggregationBlock
from tests.vectors.kinds import Chain, Op, Part
from tests.vectors.mixed import MaskMixedBatch
from tests.vectors.op_kinds import (
    AnchorWindowOp,
    BlockMixtureOp,
    BlockOp,
    HeadShardingOp,
    HyenaOp,
    InwardWindowOp,
    ProbSparseOp,
    RectifiedSparseOp,
    ResidualOp,
    RoutingOp,
    SpanMixtureOp,
)


def cfsr_parts(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of the mixer, of the MLP and of a block for maps (B, H, W, C), in (B, C, H, W)."""
    outputs = (block.mixer(block.norm1(x)), block.mlp(block.norm2(x)), block(x))
    return tuple(out.permute(0, 3, 1, 2) for out in outputs)


def subspace_attention(dim: int, groups: int) -> nn.Module:
    """Return the gate ULSAM, for which the authors' separate weights of each group of channels are joined."""
    gate = create_gate({"name": "ulsam", "groups": groups}, dim)
    names = {"conv_dws": "scale", "bn_dws": "scale_norm", "conv_point": "score", "bn_point": "score_norm"}

    def join(state: dict[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for key, value in state.items():
            layer, name = key.split(".")[-2:]
            parts.setdefault(f"{names.get(layer, layer)}.{name}", []).append(value)
        return {key: torch.cat(values) if values[0].ndim else values[0] for key, values in parts.items()}

    gate.checkpoint_filter = join
    return gate


# The authors' blocks are always shifted by 1
ANCHOR_WINDOW = AnchorWindowOp(
    "anchor_window",
    {"dim": "dim", "heads": "num_heads", "window": "window"},
    {"shift": 1, "bias": False},
    layout="tokens",
)
BILEVEL_ROUTING = Op(
    "bilevel_routing",
    {"dim": "dim", "num_heads": "num_heads", "n_win": "n_win", "topk": "topk", "side_dwconv": "lepe_kernel"},
)
BLOCK_MIXTURE = BlockMixtureOp(
    "block_mixture",
    {
        "dim": "dim",
        "heads": "num_heads",
        "select_mode": "select",
        "moba_topk": "topk",
        "simsum_threshold": "threshold",
        "threshold_type": "scope",
    },
    layout="tokens",
)
CHUNK_RECURRENCE = ResidualOp(
    "chunk_recurrence",
    {"d_model": "dim", "num_head": "num_heads", "chunk_size": "length", "ngroups": "groups"},
    {"causal": True, "norm": True},
    layout="tokens",
)
CIRCULAR_LOCAL = Op(
    "circular_local",
    {"dim": "dim", "heads": "num_heads", "window_size": "radius", "down_factor": "pool"},
    layout="tokens",
)
DOUBLE_WINDOW = Op(
    "double_window",
    {"dim": "dim", "num_heads": "num_heads", "window_size": "window"},
    layout="tokens",
)
DYNAMIC_MASK = Op(
    "dynamic_mask",
    {"dim": "dim", "heads": "num_heads", "kv_heads": "kv_heads", "window_size": "keys"},
    layout="tokens",
)
FULL = Op("full", {"dim": "dim", "side_dwconv": "lepe_kernel"}, {"num_heads": 8, "qkv_bias": False})
GATED = Op(
    "gated",
    {"hidden_size": "dim", "num_attention_heads": "num_heads", "gate": "gate"},
    {"of": {"name": "grouped_query", "kv_heads": 3, "qkv_bias": False, "proj_bias": False, "qk_norm": True}},
    layout="tokens",
)
GAUSSIAN_ADAPTIVE = {"num_heads": "num_heads", "num_gaussians": "gaussians"}
GROUPED_QUERY = Op(
    "grouped_query",
    {"dim": "dim", "num_heads": "num_heads", "num_kv_heads": "kv_heads", "qkv_bias": "qkv_bias"},
    layout="tokens",
)
HYBRID_ATTENTION = BlockOp(
    "overlapping_cross",
    {
        "dim": "dim",
        "num_heads": "num_heads",
        "window_size": "window",
        "shift_size": "shift",
        "conv_scale": "channel",
        "compress_ratio": "compress",
        "squeeze_factor": "squeeze",
    },
    {"overlap": 0.0},
    block_renames=((r"^attn\.", "mixer."), (r"^conv_block\.", "mixer.branch.")),
)
HEAD_SHARDING = HeadShardingOp(
    "head_sharding",
    {
        "num_heads": "num_heads",
        "block_size": "block",
        "local_blocks": "local",
        "vert_stride": "stride",
        "num_kv_heads": "kv_heads",
        "num_dense_heads": "dense_heads",
        "homo_head": "homogeneous",
        "head_sliding_step": "step",
        "head_sliding_offset": "offset",
    },
    {"offset": 0},
)
HYENA = HyenaOp("hyena", {"d_model": "dim", "l_max": "size", "order": "order", "filter_order": "filter_width"})
# The vectors' layer is the first one of 12, on tokens in a row
LIGHTNING = Op(
    "lightning",
    {"embed_dim": "dim", "num_heads": "num_heads", "bias": "bias"},
    {"place": Place(depth=12), "form": "causal"},
    layout="tokens",
)
LOCAL_SCAN = Op(
    "local_scan", {"dim": "dim", "d_state": "states", "ssm_ratio": "expansion"}, {"num_heads": 1, "window": 0}
)
MSA_CONV = Op(
    "msa_conv",
    {
        "input_channel": "dim",
        "output_channel": "out_dim",
        "kernel_size": "kernel",
        "dilation": "dilation",
        "stride": "conv_stride",
        "padding": "conv_padding",
        "bias": "bias",
    },
    {"num_heads": 1, "conv_padding": 1},
    layout="NCHW",
)
MULTI_HEAD_SCAN = Op(
    "multi_head_scan",
    {"d_model": "dim", "d_state": "states", "head_num": "patterns", "gfu_t": "threshold", "with_proj": "project"},
    {"num_heads": 1},
)
NEIGHBORHOOD = Op(
    "neighborhood",
    {
        "dim": "dim",
        "heads": "num_heads",
        "kernel_size": "kernel",
        "dilation": "dilation",
        "stride": "stride",
        "is_causal": "causal",
    },
    {"bias": False},
    layout="tokens",
)
OVERLAPPING_CROSS = BlockOp(
    "overlapping_cross",
    {"dim": "dim", "num_heads": "num_heads", "window_size": "window", "overlap_ratio": "overlap"},
    block_renames=((r"^(qkv|proj|relative_position_bias_table)\b", r"mixer.\1"),),
)
POLYLINE_PATH = Op("polyline_path", {"embed_dim": "dim", "num_heads": "num_heads"})
PROB_SPARSE = ProbSparseOp("prob_sparse", {"dim": "dim", "heads": "num_heads", "factor": "factor"}, {"lepe_kernel": 0})
RECTIFIED_SPARSE = RectifiedSparseOp(
    "rectified_sparse", {"dim": "dim", "heads": "num_heads", "top_k": "topk", "prob_threshold": "share"}
)
ROUTING = RoutingOp(
    "cluster_routing",
    {
        "dim": "dim",
        "heads": "num_heads",
        "window_size": "cluster_size",
        "num_clusters": "clusters",
        "local_attn_heads": "local_heads",
        "shared_qk": "shared_qk",
    },
)
VARIED_SIZE_WINDOW = Op(
    "varied_size_window",
    {"dim": "dim", "out_dim": "out_dim", "num_heads": "num_heads", "window_size": "window"},
    layout="NCHW",
)

OPS: dict[str, Op] = {
    "biformer__attnlepe_op_7": FULL,
    "biformer__bra_op_14": BILEVEL_ROUTING,
    "biformer__bra_op_28_topk4": BILEVEL_ROUTING,
    "biformer__bra_op_56": BILEVEL_ROUTING,
    "biformer__bra_op_pad_27x33": BILEVEL_ROUTING,
    "clear_attention__down4_r4": CIRCULAR_LOCAL,
    "clear_attention__local_r4": CIRCULAR_LOCAL,
    "clear_attention__local_r8": CIRCULAR_LOCAL,
    "dynamic_mask_attention__topk64": DYNAMIC_MASK,
    "freeswim__window_12x10_d3x2": InwardWindowOp("inward_window", {}, layout="tokens"),
    "gated_attention__elementwise_d96_h6_kv3": GATED,
    "gated_attention__headwise_d96_h6_kv3": GATED,
    "gaussian_adaptive_attention__block_axis1": Chain("gaussian_adaptive", GAUSSIAN_ADAPTIVE, layout="tokens"),
    "gaussian_adaptive_attention__mh_axis_last": Op(
        "gaussian_adaptive", GAUSSIAN_ADAPTIVE, {"dim": 48, "axis": "channels"}, layout="tokens"
    ),
    "hat__hab_d96_w8_shift4": HYBRID_ATTENTION,
    "hat__ocab_d96_w8": OVERLAPPING_CROSS,
    "hyena_nd__filter2d_seq_c32_14": HYENA,
    "hyena_nd__product_std_c32_14": HYENA,
    "informer__probsparse_n144_f5": PROB_SPARSE,
    "informer__probsparse_n196_f3": PROB_SPARSE,
    "kdgqa__d96_h6_kv3": replace(GROUPED_QUERY, arguments={"allocation": "batch_key_norm"}),
    "kdgqa__gqa_d96_h6_kv3": GROUPED_QUERY,
    "lamamba__ss2d_cross_8x8_n1": replace(LOCAL_SCAN, arguments={**LOCAL_SCAN.arguments, "scan": "cross"}),
    "lamamba__ss2d_snake_8x8_n1": LOCAL_SCAN,
    "lightning_attention__d128_h4_n196_causal": LIGHTNING,
    "lightning_attention__d128_h4_n196_causal_nodecay": replace(
        LIGHTNING, arguments={**LIGHTNING.arguments, "decay": False}
    ),
    "lightning_attention__d128_h4_n196_noncausal": replace(LIGHTNING, arguments={"form": "all"}),
    "mhs_vm__mhsm_d48_h3_12x12": replace(MULTI_HEAD_SCAN, arguments={"num_heads": 1, "form": "plain"}),
    "mhs_vm__vssgate_d64_h4_8x12_t05": MULTI_HEAD_SCAN,
    "moa__bands_n192_b16": SpanMixtureOp(
        "span_mixture", {"dim": "dim", "heads": "num_heads", "block": "block", "causal": "causal"}
    ),
    "natten__k4_s2_d3_16x14": NEIGHBORHOOD,
    "natten__k5_d3x2_16x14": NEIGHBORHOOD,
    "natten__k7_16x14": NEIGHBORHOOD,
    "natten__k7_causal_16x14": NEIGHBORHOOD,
    "natten__k7_causal_y_16x14": NEIGHBORHOOD,
    "natten__k7_d2_16x14": NEIGHBORHOOD,
    "natten__k7_s2_16x14": NEIGHBORHOOD,
    "natten__k8_s4_16x14": NEIGHBORHOOD,
    "ppma__ppma_chunk_op_28": replace(POLYLINE_PATH, arguments={"form": "chunk"}),
    "ppma__ppma_whole_op_14x10": replace(POLYLINE_PATH, arguments={"form": "whole"}),
    "rat_rnn__d48_h6_l14_n196": CHUNK_RECURRENCE,
    "rat_rnn__d64_h4_l8_n64": CHUNK_RECURRENCE,
    "rectified_spaattn__n250_b16_k2_p20_near": RECTIFIED_SPARSE,
    "rectified_spaattn__n256_b16_k3_p30": RECTIFIED_SPARSE,
    "routing_attention__d128_h4_n256_w64": ROUTING,
    "routing_attention__d128_h4_n256_w64_sharedqk": ROUTING,
    "routing_attention__d96_h3_n196_w49": ROUTING,
    "scale_dit__block_shift1_16x12_w4_low4x3": ANCHOR_WINDOW,
    "scale_dit__sliding_16x12_w4x6_low4x3": ANCHOR_WINDOW,
    "styleswin__double_12x18_ws6": DOUBLE_WINDOW,
    "styleswin__double_16x16_ws8": DOUBLE_WINDOW,
    "styleswin__double_8x8_ws8_noshift": DOUBLE_WINDOW,
    "s2_attention__bidir_abs_h4_b7_l1_s4_n196": HEAD_SHARDING,
    "s2_attention__causal_h4_b16_l2_s4": HEAD_SHARDING,
    "tic__op_k3": MSA_CONV,
    "tic__op_k3_d2": MSA_CONV,
    "tic__op_k5_s2": MSA_CONV,
    "vmoba__thr25_headglobal_chunk4x4": BLOCK_MIXTURE,
    "vmoba__thr25_qh_chunk4x4": BLOCK_MIXTURE,
    "vmoba__topk2_chunk4x4": BLOCK_MIXTURE,
    "vmoba__topk3_rows": BLOCK_MIXTURE,
    "vsa__vsa_op_14": VARIED_SIZE_WINDOW,
    "vsa__vsa_op_56": VARIED_SIZE_WINDOW,
    "vsa__vsa_op_pad_30": VARIED_SIZE_WINDOW,
}

PARTS: dict[str, Part | Block] = {
    "catanet__lrsa_d40_ps16": Block(LocalRegionBlock),
    "catanet__tab_d40_m16_g64_chunkmeans": Block(TokenAggregationBlock),
    "catanet__tab_d40_m16_g64_ema": Block(TokenAggregationBlock),
    "cfsr__block_d48_k9_train": Part(
        lambda: nn.ModuleDict({"block": cfsr.Block(48, create_op("large_kernel", 48, 1))}),
        lambda net, x: cfsr_parts(net["block"], x.permute(0, 2, 3, 1)),
        # Three fixed filters, which are parameters there
        constants=3 * 96 * 9,
    ),
    "ep_probe__abmilp_dim96": Part(lambda: create_pool("abmilp", 96)),
    "ep_probe__aim_dim96": Part(lambda: create_pool("aim", 96, num_heads=6)),
    "ep_probe__jepa_dim96": Part(lambda: create_pool("jepa", 96, num_heads=6)),
    "ep_probe__q12_d1_dim384": Part(lambda: create_pool("ep", 384, queries=12)),
    "ep_probe__q32_d1_dim768": Part(lambda: create_pool("ep", 768, queries=32)),
    "ep_probe__q8_d2_dim384": Part(lambda: create_pool("ep", 384, queries=8, reduction=2)),
    "ep_probe__simpool_dim96": Part(lambda: create_pool("simpool", 96)),
    "featenhancer__full": Part(FeatEnHancer),
    "mixpro__maskmix_56_14_seed0": Part(MaskMixedBatch, lambda batch, x: batch(x)),
    "hyperzzw__sfne_c12_s16": Part(
        lambda: SlowFastBlock(12, 36, (16, 16)), lambda block, x: (block(x), block.slow_net_g())
    ),
    "hyperzzw__terminator_cifar10": Part(
        lambda: timm.create_model("terminator_cifar", num_classes=10), lambda net, x: (*net.stages(x)[::2], net(x))
    ),
    "lamamba__block_8x8_ws4": Part(lambda: LaMambaBlock(48, 3, window=4, shift=0)),
    "lamamba__block_8x8_ws4_shift2": Part(lambda: LaMambaBlock(48, 3, window=4, shift=2)),
    "lola_specvit__block_d48_h4_w7": Part(
        lambda: nn.ModuleDict({"block": lola_specvit.Block(48, create_op("lora_window", 48, 4), 0.0, 16, 32, False)}),
        lambda net, x: (
            net["block"].mixer(net["block"].norm1(x)),
            net["block"](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        ),
    ),
    "psa__psa_p_c64": Part(lambda: create_gate("psa", 64)),
    "psa__psa_s_c64": Part(lambda: create_gate({"name": "psa", "form": "sequential"}, 64)),
    "rat__basic_layer_c64": Block(RegionLayer),
    "rcmha__d48_h6_n40_causal_mem8": Part(
        lambda: create_op("relative_conv", 48, 6, mode="causal1d", reach=64),
        lambda op, x: (op.attend_sequence(x.transpose(0, 1), memory=8).transpose(0, 1),),
    ),
    "rcmha__d48_h6_n49_bidir": Part(
        lambda: create_op("relative_conv", 48, 6, mode="1d", reach=64),
        lambda op, x: (op.attend_sequence(x.transpose(0, 1)).transpose(0, 1),),
    ),
    "ulsam__c64_g1": Part(lambda: subspace_attention(64, 1), lambda gate, x: (gate(x), gate(x) - x)),
    "ulsam__c64_g4": Part(lambda: subspace_attention(64, 4), lambda gate, x: (gate(x), gate(x) - x)),
    **{f"cfsr__x{scale}": Part(lambda scale=scale: cfsr.CFSR(scale, merged=True)) for scale in (2, 3, 4)},
}
