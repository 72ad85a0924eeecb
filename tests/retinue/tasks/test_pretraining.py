"""Methods of pretraining against plain loops, and the parameters that they train."""

import math

import numpy as np
import pytest
import timm
import torch

from datamodules.views import Shape, draw_mask
from models import create_model
from models.masking import MaskedStem, patchify, resize_mask
from retinue.tasks.methods.mae import MAE, normalise_patches
from retinue.tasks.methods.selfie import Selfie
from retinue.tasks.methods.simmim import SimMIM, masked_l1
from retinue.tasks.methods.unused import unused_parameters

SIDE = 32
SWIN = {"name": "swin_nano"}
VIT = {"name": "deit_tiny", "patch": 4, "depths": [2], "dim": 48, "heads": 3}
TIMM_VIT = {"name": "vit_tiny_patch16_224", "patch_size": 4, "depth": 2, "embed_dim": 48}
TIMM_SWIN = {"name": "swin_tiny_patch4_window7_224", "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}
CASES = [
    (SimMIM, SWIN, (8, 8), 39), (SimMIM, VIT, (8, 8), 39), (SimMIM, TIMM_VIT, (8, 8), 39),
    (SimMIM, TIMM_SWIN, (8, 8), 39), (SimMIM, {"name": "resnet10t"}, (8, 8), 39),
    (MAE, VIT, (8, 8), 48), (MAE, TIMM_VIT, (8, 8), 48), (Selfie, SWIN, (4, 4), 4), (Selfie, VIT, (4, 4), 4),
]  # fmt: skip


def build(method, net, grid, masked):
    torch.manual_seed(0)
    backbone = create_model(net, 0, 3, SIDE)
    return method(backbone, image_size=(SIDE, SIDE), in_chans=3, views=[Shape((SIDE, SIDE), grid, masked)])


def make_batch(grid, masked, images=3):
    np.random.seed(0)
    masks = torch.stack([torch.from_numpy(draw_mask(grid, masked)) for _ in range(images)])
    image = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"views": [{"image": image, "mask": masks}]}


@pytest.mark.parametrize(("method", "net", "grid", "masked"), CASES)
def test_each_trained_parameter_gets_a_gradient_and_the_others_are_known(method, net, grid, masked):
    model = build(method, net, grid, masked)
    unused = unused_parameters(model, 3)
    model(make_batch(grid, masked), 0.0)["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == unused
    if method is Selfie:
        last = ("backbone.stages.3.", "backbone.blocks.1.", "backbone.norm.", "backbone.cls_token")
        assert unused and all(name.startswith(last) for name in unused)
    elif "resnet" not in net["name"]:
        assert not unused


@pytest.mark.parametrize("net", [SWIN, VIT, TIMM_VIT, TIMM_SWIN, {"name": "resnet10t"}])
def test_masked_pixels_have_no_influence_before_they_are_predicted(net):
    model = build(SimMIM, net, (8, 8), 39).eval()
    view = make_batch((8, 8), 39)["views"][0]
    pixels = resize_mask(view["mask"], (SIDE, SIDE))[:, None]
    changed = torch.where(pixels, torch.randn_like(view["image"]), view["image"])
    with torch.no_grad():
        same, other = (model.reconstruct(image, view["mask"]) for image in (view["image"], changed))
        unmasked = model.decoder(model.backbone.forward_intermediates(changed, indices=1, intermediates_only=True)[0])
    # The stem of ResNet-10-T has overlapping patches, so pixels beside a mask's edge see masked ones.
    assert torch.allclose(same, other, atol=1e-5) == ("resnet" not in net["name"])
    assert not torch.allclose(same, unmasked, atol=1e-3)


def test_the_loss_of_simmim_is_the_mean_over_masked_pixels():
    view = make_batch((4, 4), 10)["views"][0]
    image, mask = view["image"].double(), view["mask"]
    prediction = torch.randn_like(image)
    errors = [
        abs(float(prediction[b, c, y, x] - image[b, c, y, x]))
        for b in range(3) for c in range(3) for y in range(0, SIDE, 3) for x in range(0, SIDE, 3)
        if mask[b, y // 8, x // 8]
    ]  # fmt: skip
    # Pixels other than those of the loop are predicted exactly, and count in the mean.
    grid = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    grid[::3, ::3] = True
    loss = masked_l1(torch.where(grid, prediction, image), image, mask)
    assert float(loss) == pytest.approx(sum(errors) / (3 * 3 * 10 * 64), rel=1e-6)


def test_the_loss_of_mae_is_that_of_a_loop_over_patches():
    model = build(MAE, VIT, (8, 8), 48).double().eval()
    batch = make_batch((8, 8), 48)
    view = batch["views"][0]
    view["image"] = view["image"].double()
    with torch.no_grad():
        loss = model(batch, 0.0)["loss"]
        errors = []
        for image, mask in zip(view["image"], view["mask"], strict=True):
            places = [(row, column) for row in range(8) for column in range(8)]
            seen = [i for i, place in enumerate(places) if not mask[place]]
            hidden = [i for i, place in enumerate(places) if mask[place]]
            # The encoder, one visible patch after the other
            net = model.backbone
            patches = [image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] for row, column in places]
            weight, bias = net.patch_embed.proj.weight, net.patch_embed.proj.bias
            tokens = [net.cls_token[0, 0] + net.pos_embed[0, 0]]
            tokens += [(weight * patches[i]).sum((1, 2, 3)) + bias + net.pos_embed[0, 1 + i] for i in seen]
            x = torch.stack(tokens)[None]
            for block in net.blocks:
                x = block(x, (1, len(seen)))
            x = model.embed(net.norm(x))[0]
            whole = [x[0]] + [x[1 + seen.index(i)] if i in seen else model.mask_token[0, 0] for i in range(64)]
            y = model.predict(model.norm(model.blocks(torch.stack(whole)[None] + model.positions)))[0, 1:]
            for i in hidden:
                target = patches[i].flatten()
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append((y[i] - target).square().mean())
    assert float(loss) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-9)


def test_both_kinds_of_vit_encode_all_patches_as_without_a_mask():
    for net in (VIT, TIMM_VIT):
        model = build(MAE, net, (8, 8), 48).eval()
        image = make_batch((8, 8), 48)["views"][0]["image"]
        order = torch.arange(64).expand(3, -1)
        with torch.no_grad():
            visible = model.visible_tokens(model.backbone, image, order)
            assert torch.allclose(visible, model.backbone.forward_features(image), atol=1e-5)
        assert not model.backbone.pos_embed.requires_grad


def test_the_loss_of_selfie_is_that_of_a_loop_over_masked_places():
    model = build(Selfie, SWIN, (4, 4), 4).double().eval()
    batch = make_batch((4, 4), 4)
    view = batch["views"][0]
    view["image"] = view["image"].double()
    with torch.no_grad():
        loss = model(batch, 0.0)["loss"]
        losses = []
        for image, mask in zip(view["image"], view["mask"], strict=True):
            places = [(row, column) for row in range(4) for column in range(4)]
            patches = [image[None, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] for row, column in places]
            embedded = [model.embed(patch)[0] for patch in patches]
            seen = [embedded[i] for i, place in enumerate(places) if not mask[place]]
            summary = model.pooling(torch.stack([model.query[0, 0], *seen])[None])[0, 0]
            hidden = [i for i, place in enumerate(places) if mask[place]]
            for right, i in enumerate(hidden):
                row, column = places[i]
                query = summary + model.row[row, 0] + model.column[0, column]
                logits = torch.stack([query @ embedded[k] for k in hidden])
                losses.append(-logits.log_softmax(0)[right])
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)


@pytest.mark.parametrize(("method", "net", "grid", "masked"), [CASES[0], CASES[5], CASES[7]])
def test_the_loss_of_a_batch_is_the_mean_over_its_halves(method, net, grid, masked):
    model = build(method, net, grid, masked).double().eval()
    batch = make_batch(grid, masked, images=4)
    view = batch["views"][0]
    view["image"] = view["image"].double()
    halves = [{"views": [{key: value[part] for key, value in view.items()}]} for part in (slice(0, 2), slice(2, 4))]
    with torch.no_grad():
        whole, *parts = (float(model(part, 0.0)["loss"]) for part in (batch, *halves))
    # SimMIM adds 1e-5 to the number of masked pixels.
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-8)


def test_patches_lie_row_by_row():
    image = torch.randn(2, 3, 8, 12)
    patches = patchify(image, (2, 3))
    assert patches.shape == (2, 6, 3, 4, 4)
    assert torch.equal(patches[1, 4], image[1, :, 4:8, 4:8])
    patch = torch.randn(1, 1, 48)
    expected = (patch - patch.mean()) / math.sqrt(float(patch.var()) + 1e-6)
    assert torch.allclose(normalise_patches(patch), expected)


@pytest.mark.parametrize(
    ("method", "net", "says"),
    [
        (MAE, SWIN, "method=mae needs a ViT with full attention and learned positions, not Swin"),
        (MAE, VIT | {"mixers": "agent"}, "method=mae needs a ViT with full attention"),
        (SimMIM, {"name": "densenet121"}, "DenseNet has no patch embedding to mask"),
    ],
)
def test_a_net_that_a_method_cannot_train_is_refused(method, net, says):
    with pytest.raises(ValueError, match=says):
        build(method, net, (8, 8), 48)


def test_a_mask_that_does_not_divide_the_embeddings_is_refused():
    net = timm.create_model("swin_nano", num_classes=0)
    stem = MaskedStem(net, (SIDE, SIDE), 3)
    with (
        pytest.raises(ValueError, match=r"a mask of 5 x 5 patches does not divide the net's 16 x 16 embeddings"),
        stem.masking(torch.zeros(1, 5, 5, dtype=torch.bool)),
    ):
        net(torch.randn(1, 3, SIDE, SIDE))
