"""Claims: which net or head of ours must reproduce each reference vector; `op_claims.py` has those of ops.

A new backbone's author adds a line for each of its vectors here. Some claims name vectors that the repository does not
hold (large nets and a few variants); such a claim is tested as soon as the vector's file is put beside the others.
"""

from collections.abc import Callable, Mapping

from torch import nn

from models.heads.att_swin_unet import AttSwinUNetHead, CrossContextualAttention
from models.heads.ds_transunet import DSTransUNetHead, InteractiveFusion
from models.heads.hbformer import FusionStep, HBFormerHead
from models.heads.iml_vit import PredictHead
from models.heads.rcnet import RCNet
from models.heads.sdanet import SelectiveDenseAttention
from models.heads.vwformer import VWHead
from tests.vectors.kinds import ClassTokenNet, Net


def nets(names: Mapping[str, str]) -> dict[str, Net]:
    """Return one claim without arguments for each pair of a vector's name and a net's name."""
    return {vector: Net(name) for vector, name in names.items()}


NETS: dict[str, Net] = {
    # Agent Attention
    "agent_attention__agent_deit_t": Net("agent_deit_tiny"),
    "agent_attention__agent_deit_s": Net("agent_deit_small"),
    "agent_attention__agent_pvt_t": Net("agent_pvt_tiny"),
    "agent_attention__agent_swin_t": Net("agent_swin_tiny"),
    "agent_attention__agent_cswin_t": Net("agent_cswin_tiny"),
    "agent_attention__det_agent_swin_t_stages": Net("agent_swin_tiny", {"norms": True, "pool": (9, 12, 14, 7)}),
    # Astroformer, for images of 64 pixels
    "astroformer__astroformer_0": Net("astroformer_0", {"img_size": 64}),
    "astroformer__astroformer_1": Net("astroformer_1", {"img_size": 64}),
    "astroformer__astroformer_2": Net("astroformer_2", {"img_size": 64}),
    # BiFormer
    **nets({f"biformer__biformer_{size}": f"biformer_{size}" for size in ("tiny", "small", "base")}),
    "biformer__biformer_stl": Net("biformer_stl"),
    "biformer__biformer_stl_nchw": Net("biformer_stl_nchw"),
    "biformer__biformer_small_seg": Net("biformer_small", {"norms": True, "n_win": 8}),
    "biformer__biformer_small_seg_n7pad": Net("biformer_small", {"norms": True}),
    # BossNAS
    **nets({f"bossnas__bossnet_{size}": f"bossnet_{size}" for size in ("t0", "t0_nose", "t1")}),
    # CrossViT
    **nets({f"crossvit__{size}_224": f"crossvit_{size}_240" for size in ("tiny", "small", "base")}),
    **nets({f"crossvit__{depth}_224": f"crossvit_{depth}_240" for depth in (9, 15, 18)}),
    **nets({f"crossvit__{depth}_dagger_224": f"crossvit_{depth}_dagger_240" for depth in (9, 15, 18)}),
    "crossvit__9_224_in224": Net("crossvit_9_240"),
    # CSWin
    "cswin__cswin_64_12211_tiny_224": Net("cswin_tiny"),
    "cswin__cswin_64_24322_small_224": Net("cswin_small"),
    "cswin__cswin_96_24322_base_224": Net("cswin_base"),
    "cswin__cswin_tiny_seg": Net("cswin_tiny", {"norms": True}),
    "cswin__cswin_tiny_seg_pad": Net("cswin_tiny", {"norms": True}),
    # DaViT
    **nets({f"davit__davit_{size}": f"davit_{size}" for size in ("tiny", "small", "base")}),
    "davit__davit_tiny_seg": Net("davit_tiny", {"norms": True}),
    "davit__davit_tiny_seg_pad": Net("davit_tiny", {"norms": True}),
    # DiNAT
    **nets({f"dinat__dinat_{size}": f"dinat_{size}" for size in ("mini", "tiny", "small", "base")}),
    "dinat__dinat_mini_seg": Net(
        "dinat_mini", {"norms": True, "dilations": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))}
    ),
    # EfficientViT
    **nets({f"efficientvit__m{i}": f"efficientvit_m{i}" for i in range(6)}),
    "efficientvit__det_m4_stages": Net("efficientvit_m4", {"img_size": 512}),
    # EViT
    **{
        f"evit__deit_s_k{keep}": Net("evit_small", {"keep": keep / 100, "fuse": False}) for keep in (50, 60, 70, 80, 90)
    },
    **{f"evit__deit_s_k{keep}_fuse": Net("evit_small", {"keep": keep / 100}) for keep in (50, 60, 70, 80, 90)},
    # FaViT
    **nets({f"favit__favit_b{i}": f"favit_b{i}" for i in range(4)}),
    "favit__favit_b1_stages": Net("favit_b1"),
    # Flowformer
    "flowformer__vision_19l": Net("flowformer_base"),
    # FocalNet
    **nets({f"focalnet__{size}_srf": f"focalnet_{size}_srf" for size in ("tiny", "small", "base")}),
    **nets({f"focalnet__{size}_lrf": f"focalnet_{size}_lrf" for size in ("tiny", "small", "base")}),
    "focalnet__tiny_iso": Net("focalnet_tiny_iso"),
    "focalnet__det_tiny_srf_stages": Net("focalnet_tiny_srf", {"norms": True, "focal_windows": (9, 9, 9, 9)}),
    # GC ViT: timm's classifiers; tests/models/test_gcvit.py compares ours with the same vectors.
    **nets({f"gcvit__gc_vit_{size}": f"gcvit_{size}" for size in ("xxtiny", "xtiny", "tiny", "small", "base")}),
    "gcvit__gc_vit_tiny_det": Net("gc_vit_tiny", {"norms": True, "window": 24, "poolings": (3, 2, 1, 0)}),
    # GhostNetV2
    **nets({f"ghostnetv2__x{width}": f"ghostnetv2_{width}0" for width in (10, 13, 16)}),
    # HaloNet
    "halonet__halonet26t": Net("halonet26t"),
    "halonet__halonet_h1": Net("halonet_h1"),
    # InLine
    "inline__inline_deit_t": Net("inline_deit_tiny"),
    "inline__inline_deit_s": Net("inline_deit_small"),
    "inline__inline_pvt_t": Net("inline_pvt_tiny"),
    "inline__inline_swin_t": Net("inline_swin_tiny"),
    "inline__inline_cswin_t": Net("inline_cswin_tiny"),
    # KDGQA
    "key_driven_gqa__s_mhsa": Net("kdgqa_small", {"allocation": "uniform", "kv_heads": 6}),
    "key_driven_gqa__s_gqa": Net("kdgqa_small", {"allocation": "uniform"}),
    "key_driven_gqa__s_kdgqa": Net("kdgqa_small"),
    # L2ViT
    **nets({f"l2vit__l2vit_{size}": f"l2vit_{size}" for size in ("tiny", "small", "base")}),
    "l2vit__l2vit_tiny_seg_pad": Net("l2vit_tiny", {"norms": True}),
    # LITv2
    **nets({f"litv2__litv2_{size}": f"litv2_{size}" for size in ("small", "medium", "base")}),
    "litv2__litv2_small_seg": Net("litv2_small", {"norms": True, "crop_odd": True}),
    "litv2__litv2_small_seg_pad": Net("litv2_small", {"norms": True, "crop_odd": True}),
    # LV-ViT
    "lvvit__lvvit_t": Net("lvvit_tiny"),
    # LoLA-SpecViT
    "lola_specvit__net_d32_111": Net("lola_specvit", {"dim": 32, "depths": (1, 1, 1)}),
    # MambaOut
    **nets({f"mambaout__{size}": f"mambaout_{size}" for size in ("femto", "kobe", "tiny", "small", "base")}),
    "mambaout__femto_stages": Net("mambaout_femto"),
    # MaxViT
    **nets({f"maxvit__maxvit_{size}_tf_224": f"maxvit_{size}_tf_224" for size in ("tiny", "small", "base")}),
    "maxvit__maxvit_tiny_tf_224_stages": Net("maxvit_tiny_tf_224"),
    # MedViTV2
    "medvitv2__tiny": Net("medvitv2_tiny", constants=8 * 8),
    "medvitv2__small": Net("medvitv2_small", constants=10 * 8),
    # MOAT; the stages' first map is the stem's
    "moat__tiny0_256": Net("tiny_moat_0"),
    "moat__tiny0_nope_192x160_pool3": Net(
        "tiny_moat_0", {"positions": False, "pool": 3, "out_indices": (0, 1, 2, 3, 4)}
    ),
    # MoH
    **nets({f"moh__vit_{size}": f"moh_transnext_{size}" for size in ("small_75", "small_80", "base_50", "base_75")}),
    # NAT
    **nets({f"nat__nat_{size}": f"nat_{size}" for size in ("mini", "tiny", "small", "base")}),
    "nat__nat_mini_seg": Net("nat_mini", {"norms": True}),
    "nat__nat_mini_seg_odd": Net("nat_mini", {"norms": True}),
    # PATNet
    **nets({f"patnet__{size}": f"patnet_{size}" for size in ("t0", "t1", "t2", "s", "m", "l")}),
    "patnet__t0_stages": Net("patnet_t0", {"norms": True}),
    # NiNformer
    "ninformer__cifar": Net("ninformer_cifar"),
    # PPMA
    "ppma__ppmavit_t": Net("ppma_tiny"),
    "ppma__ppmavit_s": Net("ppma_small"),
    "ppma__ppmavit_b": Net("ppma_base"),
    "ppma__ppmavit_t_stages": Net("ppma_tiny", {"norms": True}),
    # SHViT
    **nets({f"shvit__s{i}": f"shvit_s{i}" for i in range(1, 5)}),
    "shvit__det_s4_stages": Net("shvit_s4"),
    # SOFT
    **nets({f"soft__soft_{size}": f"soft_{size}" for size in ("tiny", "norm_tiny", "small", "norm_small")}),
    # SpectFormer
    "spectformer__vanilla_t": Net("spectformer_tiny"),
    "spectformer__vanilla_xs": Net("spectformer_xsmall"),
    "spectformer__vanilla_s": Net("spectformer_small"),
    "spectformer__vanilla_b": Net("spectformer_base"),
    **nets({f"spectformer__h_{size[0]}": f"spectformer_h_{size}" for size in ("small", "base", "large")}),
    **{
        f"spectformer__h_{size[0]}_notl": Net(f"spectformer_h_{size}", {"token_label": False})
        for size in ("small", "base", "large")
    },
    # Sparsifiner
    "sparsifiner__s_k25": ClassTokenNet("sparsifiner_small"),
    "sparsifiner__lvvit_s_k25": Net("sparsifiner_lvvit_small"),
    "sparsifiner__s_k25_t70": ClassTokenNet("sparsifiner_small", {"keep_tokens": 0.7}),
    # Swin and Swin V2
    **nets({f"swin__swin_{size}": f"swin_{size}" for size in ("tiny", "small", "base")}),
    "swin__swinv2_tiny_window8_256": Net("swinv2_tiny_window8_256"),
    "swin__swinv2_tiny_window16_256": Net("swinv2_tiny_window16_256"),
    # FAN and RVT with TAP and ADL
    "tapadl__fan_tiny_12_p16": Net("fan_tiny", {"scales": 4}),
    "tapadl__fan_small_12_p16": Net("fan_small", {"scales": 4}),
    "tapadl__fan_base_18_p16": Net("fan_base", {"scales": 4}),
    "tapadl__fan_large_24_p16": Net("fan_large", {"scales": 4}),
    "tapadl__fan_tiny_8_p4_hybrid": Net("fan_tiny_hybrid", {"scales": 4}),
    "tapadl__fan_small_12_p4_hybrid": Net("fan_small_hybrid", {"scales": 4}),
    "tapadl__fan_base_16_p4_hybrid": Net("fan_base_hybrid", {"scales": 4}),
    "tapadl__fan_large_16_p4_hybrid": Net("fan_large_hybrid", {"scales": 4}),
    "rvt__rvt_base_plus_d2": Net("rvt_base_plus", {"depths": (2,), "masked": 1}),
    "tapadl__rvt_tiny_plus": Net("rvt_tiny_plus", {"scales": 1}),
    "tapadl__rvt_small_plus": Net("rvt_small_plus", {"scales": 1}),
    "tapadl__rvt_base_plus": Net("rvt_base_plus", {"scales": 1}),
    # TransNeXt
    **nets({f"transnext__transnext_{size}": f"transnext_{size}" for size in ("micro", "tiny", "small", "base")}),
    "transnext__transnext_micro_aaaa": Net("transnext_micro_aaaa", {"pretrain_size": 224}),
    "transnext__transnext_tiny_seg": Net("transnext_tiny", {"bias_size": 224}),
    "transnext__transnext_tiny_seg_256x320": Net("transnext_tiny", {"bias_size": 256}),
    "transnext__transnext_tiny_seg_256x320_extrapolation": Net("transnext_tiny"),
    # UniFormer
    **nets({f"uniformer__uniformer_{size}": f"uniformer_{size}" for size in ("small", "small_plus", "base")}),
    "uniformer__uniformer_small_seg": Net("uniformer_small", {"norms": True}),
    "uniformer__uniformer_small_seg_w14": Net("uniformer_small", {"norms": True, "window": 14}),
    "uniformer__uniformer_small_seg_h14": Net("uniformer_small", {"norms": True, "window": 14, "hybrid": True}),
    # ViT-ResNAS
    "vit_resnas__tiny": Net("vit_resnas_tiny"),
    "vit_resnas__small_2.9g": Net("vit_resnas_small"),
    "vit_resnas__medium_4.6g": Net("vit_resnas_medium"),
    "vit_resnas__ref_tiny": Net("vit_resnas_reftiny"),
    "vit_resnas__tiny_666": Net("vit_resnas_tiny666"),
    # ViTAEv2 with VSA
    **nets({f"vsa__vitaev2_vsa_{size}": f"vitaev2_vsa_{size}" for size in ("s", "widepcm_s", "widepcm_48m")}),
}

# Heads and necks take several maps: tests/models/heads/ builds and compares them.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "att_swin_unet__ccam_96": lambda: CrossContextualAttention(96),
    "att_swin_unet__decoder_32": lambda: AttSwinUNetHead((32, 64, 128, 256), 9, channels=32),
    "ds_transunet__tif_96_128": lambda: InteractiveFusion(128, 96),
    "ds_transunet__decoder_128": lambda: DSTransUNetHead((128, 256, 512, 1024), 7),
    "hbformer__mff_decoder_192_96": lambda: FusionStep(192, 96, 96),
    "hbformer__decoder_48": lambda: HBFormerHead((96, 192, 384, 768), 9),
    "iml_vit__predict_head_bn": lambda: PredictHead([256] * 5, 1),
    "rcnet__rcfpn_c64": lambda: RCNet((48, 96, 192), out_channels=64),
    "sdanet__selective_dense_attention_256": SelectiveDenseAttention,
    "vwformer__vwhead_c64_h4_s256": lambda: VWHead((96, 192, 384, 768), 19, channels=64, num_heads=4),
    "vwformer__vwcityhead_c64_s512": lambda: VWHead((96, 192, 384, 768), 19, channels=64, short_cut=False, city=True),
}
