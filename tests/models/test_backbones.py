"""Every backbone of ours keeps timm's interface."""

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from timm.models import adapt_input_conv, group_parameters, model_entrypoint
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from models import load_weights
from ops.losses import loss_weights
from retinue.utils.arithmetic import ceil_div

NAMES = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("models.backbones.")]
NAMES.sort(key=lambda name: (model_entrypoint(name).__module__, model_entrypoint(name).__code__.co_firstlineno))
# Each file begins with the smallest net of its family; the larger nets are slow tests.
FAMILIES = [name.rpartition("_")[0] for name in NAMES]
EVERY = [
    pytest.param(name, marks=pytest.mark.slow if family in FAMILIES[:i] else ())
    for i, (name, family) in enumerate(zip(NAMES, FAMILIES, strict=True))
]


def few_blocks(name: str, first: int = 2) -> dict[str, Any]:
    """Return the argument `depths` for few blocks, or nothing for a net without that argument.

    Args:
        name: Registry name of the net.
        first: Number of blocks in the first stage; the other stages have one. A net of one stage has four blocks.
    """
    with torch.device("meta"):
        net: Any = timm.create_model(name)
    parameters = inspect.signature(type(net).__init__).parameters
    if "depths" not in parameters:
        return {}
    # The stem of some nets is a stage without blocks.
    stages = sum(len(stage.blocks) > 0 for stage in getattr(net, "stages", [net]))
    return {"depths": (first, *[1] * (stages - 1)) if stages > 1 else (4,)}


def build(name: str, **kwargs: Any) -> Any:
    """Build a net with few blocks and reproducible weights."""
    torch.manual_seed(0)
    return timm.create_model(name, **few_blocks(name) | kwargs)


def blocks(net: Any) -> dict[str, Any]:
    """Return all blocks of a pyramid or of a ViT-shaped net by name."""
    stages = [(f"stages.{i}.", stage) for i, stage in enumerate(getattr(net, "stages", ()))] or [("", net)]
    return {f"{prefix}blocks.{j}": block for prefix, stage in stages for j, block in enumerate(stage.blocks)}


def first_convs(net: Any) -> list[str]:
    """Return the names of the convolutions that read the images."""
    names = net.pretrained_cfg["first_conv"]
    return [names] if isinstance(names, str) else list(names)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """Return a map (B, C, H, W) as tokens (B, H * W, C), and tokens unchanged."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


@pytest.fixture(params=EVERY, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def built(name):
    return build(name, num_classes=3, drop_path_rate=0.1)


@pytest.fixture
def net(built):
    return copy.deepcopy(built)


def test_our_names_do_not_replace_timms_names():
    assert {"biformer_nano", "biformer_stl_nchw", "swin_nano", "swin_base"} <= set(NAMES)
    assert model_entrypoint("swin_tiny_patch4_window7_224").__module__ == "timm.models.swin_transformer"


PUBLISHED = """
path_ensemble_{tiny,small,base}
biformer_{tiny,small,base,stl,stl_nchw} swin_{tiny,small,base} cswin_{tiny,small,base,large} litv2_{small,medium,base}
favit_{b0,b1,b2,b3} l2vit_{tiny,small,base} nat_{mini,tiny,small,base} dinat_{mini,tiny,small,base,large}
vitaev2_vsa_{s,widepcm_s,widepcm_48m} swin_vsa_{tiny} transnext_{micro,micro_aaaa,tiny,small,base}
uniformer_{small,small_plus,base} ppma_{tiny,small,base} pvt_{tiny,small,medium,large}
deit_{tiny,small,base,tiny_distilled,small_distilled,base_distilled} lvvit_{tiny,small,medium,large}
dcal_{tiny,small,base}
agent_deit_{tiny,small} agent_pvt_{tiny,small,medium,large} agent_swin_{tiny,small,base} agent_cswin_{tiny,small,base}
inline_deit_{tiny,small} inline_pvt_{tiny,small,medium,large} inline_swin_{tiny,small,base}
inline_cswin_{tiny,small,base} gc_vit_{xxtiny,xtiny,tiny,tiny2,small,small2,base,large}
focalnet_{tiny_iso,small_iso,base_iso} astroformer_{0,1,2,3,4,5}
moat_{0,1,2,3,4} tiny_moat_{0,1,2,3} medvitv2_{tiny,small,base,large}
vit_resnas_{tiny,small,medium,reftiny,tiny666} bossnet_{t0,t0_nose,t1}
focalnet_{tiny_iso,small_iso,base_iso} kdgqa_{small,base,large} ninformer_{cifar}
hyena_deit_{tiny,small,base} terminator_{cifar} lola_{specvit}
focalnet_{tiny_iso,small_iso,base_iso}
flowformer_{base} patnet_{t0,t1,t2,s,m,l} tic_{tiny} s2aformer_{tiny} coswin_{tiny} maformer_{tiny}
spectformer_{tiny,xsmall,small,base} spectformer_h_{small,base,large}
soft_{tiny,small,medium,large,huge} soft_norm_{tiny,small,medium,large,huge}
astroformer_{0,1,2,3,4,5} kdgqa_{small,base,large}
focalnet_{tiny_iso,small_iso,base_iso} moh_transnext_{small_75,small_80,base_50,base_75}
vitdet_{base,large,huge}
evit_{small,base,lvvit_small,lvvit_medium} sparsifiner_{small,base,lvvit_small,lvvit_medium}
fan_{tiny,small,base,large,tiny_hybrid,small_hybrid,base_hybrid,large_hybrid,xlarge_hybrid}
rvt_{tiny,tiny_plus,small,small_plus,base,base_plus}
"""


def test_every_published_size_is_registered():
    families = [entry.rstrip("}").split("{") for entry in PUBLISHED.split()]
    assert {prefix + size for prefix, sizes in families for size in sizes.split(",")} <= set(NAMES)


def test_scores_and_gradients(net):
    # Training does this too; it fails for nets that have weights of five dimensions.
    net = net.to(memory_format=torch.channels_last)
    scores, losses = net.forward_with_losses(torch.randn(2, 3, 64, 64))
    assert scores.shape == (2, 3)
    (scores.square().sum() + sum(losses.values())).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_maps_of_an_odd_size_have_the_shapes_of_feature_info(name):
    net = build(name, features_only=True, in_chans=1).eval()
    with torch.inference_mode():
        maps = net(torch.randn(1, 1, 250, 310))
    levels = zip(net.feature_info.channels(), net.feature_info.reduction(), strict=True)
    shapes = [(channels, ceil_div(250, stride), ceil_div(310, stride)) for channels, stride in levels]
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_pruning_keeps_only_what_the_maps_need(net):
    channels = [info["num_chs"] for info in net.feature_info]
    levels = len(channels)
    indices = sorted({0, max(levels - 2, 0)})
    assert net.prune_intermediate_layers([i - levels for i in indices], prune_norm=True) == indices
    maps = net.forward_intermediates(torch.randn(2, 3, 64, 64), indices, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [channels[i] for i in indices]
    torch.stack([m.sum() for m in maps]).sum().backward()
    assert len(net.stages if hasattr(net, "stages") else net.blocks) == indices[-1] + 1
    # Parameters that a loss alone trains, such as a predictor, have no gradient from the maps.
    assert loss_weights(net) or all(p.grad is not None for p in net.parameters())


def test_intermediates_and_features(net):
    net, x = net.eval(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features, maps = net.forward_intermediates(x)
        assert torch.equal(features, net.forward_features(x))
        assert torch.equal(net(x), net.forward_head(features))
        last = net.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        # The maps of a pyramid with a class token are computed without the token, those of a net that drops tokens with
        # all tokens, and those of a net whose class token joins last before that, so they differ from the features.
        of_the_map = last[0][0, 0].numel()
        if features.ndim == 4 or (not hasattr(net, "stages") and features.shape[1] == net.extra + of_the_map):
            assert torch.equal(tokens(last[0]), tokens(features)[:, -of_the_map:])
        assert torch.equal(maps[-1], last[0]) == isinstance(net.norm, torch.nn.Identity)
        first = net.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(first[0], maps[0])
    with pytest.raises(ValueError, match="must be 'NCHW', not 'NHWC'"):
        net.forward_intermediates(x, output_fmt="NHWC")


def test_classifier_can_be_replaced_and_removed(net):
    net, x = net.eval(), torch.randn(2, 3, 64, 64)
    net.reset_classifier(7)
    assert net(x).shape == (2, 7) == (2, net.num_classes) and net.get_classifier().out_features == 7
    net.reset_classifier(0)
    assert net(x).shape == (2, net.num_features)
    net.reset_classifier(0, "")
    assert net(x).shape == net.forward_features(x).shape


def test_gradient_checkpointing_changes_nothing(net):
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)  # for drop path
    scores, losses = net.forward_with_losses(x)
    grads = torch.autograd.grad(scores.square().sum() + sum(losses.values()), list(net.parameters()))
    calls = []
    next(iter(blocks(net).values())).register_forward_pre_hook(lambda *_: calls.append(1))
    net.set_grad_checkpointing()
    torch.manual_seed(1)
    recomputed_scores, losses = net.forward_with_losses(x)
    assert torch.equal(scores, recomputed_scores)
    total = recomputed_scores.square().sum() + sum(losses.values())
    recomputed_grads = torch.autograd.grad(total, list(net.parameters()))
    for recomputed, grad in zip(recomputed_grads, grads, strict=True):
        assert torch.equal(recomputed, grad)
    # The backward pass runs the block once more.
    assert len(calls) == 2


def test_layers_are_ordered_from_the_stem_to_the_head(net):
    layers: Any = group_parameters(net, net.group_matcher(), reverse=True)
    assert set(layers) == {key for key, _ in net.named_parameters()}
    for depth, name in enumerate(blocks(net), start=1):
        assert {layers[key] for key in layers if key.startswith(f"{name}.")} == {depth}
    stem = first_convs(net)[0].rpartition(".")[0]
    assert {layers[key] for key in layers if key.startswith(f"{stem}.")} == {0}
    assert layers["head.weight"] == len(blocks(net)) + 1
    assert {layers[key] for key in layers if key.startswith("norm.")} <= {len(blocks(net))}
    if hasattr(net, "stages"):
        downsample = {layers[key] for key in layers if key.startswith("stages.1.downsample.")}
        # The first block of some nets reduces the map itself.
        assert downsample <= {layers[key] for key in layers if key.startswith("stages.1.blocks.0.")}
        coarse = group_parameters(net, net.group_matcher(coarse=True), reverse=True)
        # A stem that is a stage of its own has no blocks.
        assert max(coarse.values()) == sum(len(stage.blocks) > 0 for stage in net.stages) + 1

    groups = param_groups_layer_decay(net, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(net.parameters()))
    assert scale[id(net.head.weight)] == 1 and all(scale[id(p)] == 0.5 for p in net.norm.parameters())


def test_tables_are_not_decayed(net):
    not_decayed = net.no_weight_decay()
    assert not_decayed <= {key for key, _ in net.named_parameters()}
    tables = {key for key, _ in net.named_parameters() if key.endswith("relative_position_bias_table")}
    assert tables & not_decayed == (set() if net.decays_tables else tables)
    groups = param_groups_weight_decay(net, 0.05, no_weight_decay_list=not_decayed)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1 and key not in not_decayed) for key, p in net.named_parameters())


def test_pretrained_cfg_names_existing_modules(net):
    cfg = net.pretrained_cfg
    assert all(isinstance(net.get_submodule(name), torch.nn.Conv2d) for name in first_convs(net))
    first, *further = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert net.get_submodule(first) is net.get_classifier() and (first, *further) == net.classifiers
    assert all(net.get_submodule(name).out_features == net.num_classes for name in further)
    assert cfg["num_classes"] == 1000 and cfg["custom_load"]


def test_our_own_weights_load(net, built):
    other = copy.deepcopy(built)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    result = load_weights(net, other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert len(result.loaded) == len(net.state_dict()) and not any(result[1:])


def test_weights_for_three_colours_fit_five_bands(name, built):
    other, state = build(name, num_classes=3, in_chans=5), built.state_dict()
    misfits = [key for key, value in other.state_dict().items() if value.shape != state[key].shape]
    # Terminator's first block has as many channels as the image in all of its layers.
    if misfits and set(misfits) != {f"{name}.weight" for name in first_convs(built)}:
        assert name.startswith("terminator")
        return
    assert sorted(load_weights(other, state).resized) == sorted(misfits)
    for key in misfits:
        assert torch.equal(other.get_parameter(key), adapt_input_conv(5, state[key]))
    assert other(torch.randn(2, 5, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["biformer_nano", "swin_nano"])
def test_mixers_replace_those_of_the_paper(name):
    net = build(
        name, num_classes=2, mixers=["window", ["bilevel_routing", "full"], "full", "full"], depths=(1, 2, 1, 1)
    )
    assert [type(block.mixer).__name__ for stage in net.stages for block in stage.blocks] == [
        "WindowAttention", "BilevelRoutingAttention", "FullAttention", "FullAttention", "FullAttention",
    ]  # fmt: skip
    assert net(torch.randn(1, 3, 33, 45)).shape == (1, 2)
    with pytest.raises(ValueError, match="one for each of 4 stages, not 1"):
        build(name, mixers=["full"])


def test_weights_are_initialised_as_in_the_authors_code():
    for name in ("biformer_tiny", "biformer_stl_nchw", "swin_tiny"):
        net = build(name, drop_path_rate=0.0)
        block = net.stages[2].blocks[0]
        assert abs(net.head.weight.std() - 0.02) < 1e-3 and not net.head.bias.any()
        # The authors' 1 x 1 convolutions have PyTorch's uniform initialisation.
        if name == "biformer_stl_nchw":
            assert abs(block.mlp.fc1.weight).max() < block.mlp.fc1.in_features**-0.5 and block.mlp.fc1.bias.any()
        else:
            assert abs(block.mlp.fc1.weight.std() - 0.02) < 1e-3 and not block.mlp.fc1.bias.any()


def test_windows_of_nets_for_384_pixels():
    net = build("swin_tiny", window=12, num_classes=2)
    assert net.stages[3].blocks[0].mixer.relative_position_bias_table.shape == (23 * 23, 24)
    assert net(torch.randn(1, 3, 96, 96)).shape == (1, 2)


def test_pretrained_file_is_read_by_our_loader(tmp_path):
    source = build("swin_nano", num_classes=1000)
    torch.save({"model": source.state_dict()}, tmp_path / "net.pth")
    overlay = {"file": str(tmp_path / "net.pth"), "custom_load": True}
    net = build("swin_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert torch.equal(net.stages[3].blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight)
