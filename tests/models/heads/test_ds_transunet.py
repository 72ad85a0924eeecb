"""DS-TransUNet's fusion and decoder equal the authors' code, and take any two backbones and images of any size."""

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models import load_weights
from models.heads.ds_transunet import DSTransUNetHead, enlarge
from models.openmmlab.build import build_segmentor
from models.openmmlab.segmentor import to_size_of
from models.reference import make_input
from retinue.utils.arithmetic import ceil_div
from tests.models.heads import assert_matches, input_maps, pyramid, stir, without_gradient
from tests.models.openmmlab import CLASSES, build, make_config
from tests.models.openmmlab.test_build import losses, segmentation_batch
from tests.models.openmmlab.test_build import without_gradient as untrained
from tests.vectors.claims import HEADS

CHANNELS = (8, 12, 16, 24)
NANO = {"name": "swin_nano", "patch": 8, "dim": 8, "heads": (1, 1, 2, 4)}


class Maps(nn.Module):
    """Coarse backbone that returns fixed maps."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, image):
        return self.maps


def small(**changes) -> DSTransUNetHead:
    torch.manual_seed(0)
    return stir(DSTransUNetHead(CHANNELS, 5, **{"channels": 16, "window": 4, "coarse": NANO} | changes))


def test_the_fusion_matches_the_authors_code():
    maps = [make_input([2, 128, 28, 28]), make_input([2, 96, 14, 14])]
    assert_matches("ds_transunet__tif_96_128", HEADS["ds_transunet__tif_96_128"], maps)


@pytest.mark.slow
def test_the_decoder_matches_the_authors_code():
    def without_coarse_backbone() -> nn.Module:
        head: Any = HEADS["ds_transunet__decoder_128"]()
        assert head.coarse.strides == [8, 16, 32, 64]
        head.coarse = Maps(input_maps(head.coarse.channels, 16, 24))
        # The authors' net enlarges the auxiliary logits itself.
        head.register_forward_hook(lambda _, args, outputs: [enlarge(y, args[1]) for y in outputs])
        return head

    inputs = input_maps((128, 256, 512, 1024), 32, 48), make_input([1, 3, 128, 192])
    assert_matches("ds_transunet__decoder_128", without_coarse_backbone, inputs)


def test_weights_of_the_authors_coarse_encoder_load():
    head, authors = small(), {}
    for name, value in head.state_dict().items():
        name = name.replace("coarse.net.", "encoder2.").replace("coarse.norms.", "encoder2.norm")
        authors[name.replace(".mixer.", ".attn.") if name.startswith("encoder2") else name] = value
    other = DSTransUNetHead(CHANNELS, 5, channels=16, window=4, coarse=NANO)
    loaded = load_weights(other, authors | {"encoder.patch_embed.proj.weight": torch.zeros(1)})
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("image", [(250, 310), (72, 65)])
def test_every_weight_is_trained_with_images_of_any_size(image):
    head = small()
    H, W = (ceil_div(side, 4) for side in image)
    outputs = head(pyramid(CHANNELS, H, W), torch.randn(2, 3, *image))
    deepest = ceil_div(image[0], 32), ceil_div(image[1], 32)
    assert [y.shape for y in outputs] == [(2, 5, *image), (2, 5, *deepest), (2, 5, H, W)]
    assert not without_gradient(head, torch.stack([y.square().mean() for y in outputs]).sum())


@pytest.mark.parametrize("coarse", ["resnet10t", {"name": "test_vit", "patch": None}], ids=["cnn", "vit"])
def test_any_net_is_a_coarse_backbone(coarse):
    torch.manual_seed(0)
    head = DSTransUNetHead(CHANNELS, 5, channels=16, coarse=coarse)
    assert head.coarse.strides == [8, 16, 32]
    outputs = head(pyramid(CHANNELS, 16, 20), torch.randn(2, 3, 64, 80))
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)


def test_the_losses_are_weighted_as_in_the_paper():
    model, (image, mask) = build("ds_transunet").eval(), segmentation_batch()
    logits, deep, shallow = (to_size_of(y, image) for y in model.outputs(image))
    parts = [
        F.cross_entropy(y, mask, ignore_index=255, reduction="sum") / mask.numel() for y in (logits, deep, shallow)
    ]
    loss = model.loss(image, mask)
    assert torch.allclose(loss["loss_ce"], 0.6 * parts[0])
    assert torch.allclose(loss["aux.loss_ce"], 0.2 * parts[1] + 0.2 * parts[2])
    assert torch.equal(model.logits(image), logits)


def test_the_coarse_backbone_is_recomputed_and_not_decayed_as_a_backbone():
    model = build("ds_transunet", "swin")
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert tables <= model.no_weight_decay()
    assert any("decode_head.coarse." in name for name in tables) and any(
        "decode_head.steps." in name for name in tables
    )
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.decode_head.coarse.net.stages)
    assert untrained(model, losses(model)) == []


def test_images_of_any_number_of_channels():
    torch.manual_seed(0)
    data = SimpleNamespace(num_classes=CLASSES, in_chans=5)
    model = build_segmentor(make_config("ds_transunet", "swin"), data).eval()
    with torch.no_grad():
        assert model.logits(torch.randn(1, 5, 61, 75)).shape == (1, CLASSES, 61, 75)


def test_pretrained_weights_of_the_coarse_backbone_load(tmp_path):
    net: Any = timm.create_model("swin_nano", patch=8, dim=8, heads=(1, 1, 2, 4))
    torch.save(net.state_dict(), tmp_path / "nano.pth")
    file = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "nano.pth")}}
    head: Any = DSTransUNetHead(CHANNELS, 5, channels=16, window=4, coarse=NANO | file)
    assert torch.equal(head.coarse.net.stages[1].blocks[0].mlp.fc1.weight, net.stages[1].blocks[0].mlp.fc1.weight)


def test_half_precision_is_close_to_single_precision():
    head, maps, image = small().eval(), pyramid(CHANNELS, 20, 28), torch.randn(2, 3, 80, 112)
    with torch.no_grad():
        exact = head(maps, image)[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = head(maps, image)[0]
    assert F.mse_loss(half.float(), exact).sqrt() < 0.05 * exact.std()


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"channels must be a multiple of 4, not 6$"):
        small(channels=6)
    with pytest.raises(ValueError, match=r"four maps, of strides 4, 8, 16 and 32, not 3$"):
        DSTransUNetHead(CHANNELS[1:], 5)
    with pytest.raises(ValueError, match=r"head=ds_transunet cannot be built .* no net is called 'swin_tinny'\."):
        build("ds_transunet", head__args={"coarse": "swin_tinny"})
