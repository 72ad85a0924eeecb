"""IML-ViT's decoder equals the authors' code, and its edge loss is what its docstrings say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_weights
from models.heads.iml_vit import NORMS, IMLHead, edges
from models.openmmlab.build import build_segmentor
from tests.models.heads import assert_matches, pyramid, sides, stir, without_gradient
from tests.models.openmmlab import make_config
from tests.vectors.claims import HEADS

CHANNELS = (8, 12, 16, 24)


def small(num_classes: int = 2, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return stir(IMLHead(CHANNELS, num_classes, channels=16, **arguments))


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("iml_vit__")])
def test_matches_the_authors_code(name):
    assert_matches(name, HEADS[name])


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("norm", NORMS)
def test_every_weight_is_trained_with_one_image_of_any_size(norm, num_classes):
    head = small(num_classes, norm=norm)
    logits = head(pyramid(CHANNELS, 63, 78, batch=1))
    assert logits.shape == (1, num_classes, 63, 78)
    untrained = without_gradient(head, F.cross_entropy(logits, torch.randint(0, num_classes, (1, 63, 78))))
    # The norm removes a constant that is added to all positions, and the layer norm does not.
    assert untrained <= ({"predictor.fuse.bias"} if norm != "layer" else set())


def test_two_classes_are_trained_by_binary_cross_entropy():
    """The paper's loss, written as in the paper."""
    head = small().eval()
    mask = torch.zeros(2, 40, 52, dtype=torch.long)
    mask[0, 10:22, 5:31], mask[1, :8, 40:] = 1, 1
    logits = head(pyramid(CHANNELS, 40, 52))
    manipulated = logits[:, 1]
    assert not logits[:, 0].any() and torch.allclose(logits.softmax(1)[:, 1], manipulated.sigmoid())
    errors = F.binary_cross_entropy_with_logits(manipulated, mask.float(), reduction="none")
    assert torch.allclose(F.cross_entropy(logits, mask), errors.mean())
    edge_loss = head.losses(logits, mask)["loss_edge"]
    assert torch.allclose(edge_loss, 20 * (errors * edges(mask, 7)).mean()) and edge_loss > 0


@pytest.mark.parametrize("width", [1, 3, 7])
def test_edges_are_where_a_cross_holds_two_classes(width):
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, 4, 5)).repeat_interleave(6, 1).repeat_interleave(5, 2)
    mask[0, :9, 7:] = 255
    found, reach = edges(mask, width), width // 2
    for image, rows in enumerate(mask.tolist()):
        for y, row in enumerate(rows):
            for x, label in enumerate(row):
                cross = [rows[j][x] for j in range(max(0, y - reach), min(len(rows), y + reach + 1))]
                cross += row[max(0, x - reach) : x + reach + 1]
                assert found[image, y, x] == (label != 255 and len({*cross} - {255}) > 1)
    assert found.any() == (width > 1)


def test_ignored_pixels_have_no_edge_loss():
    head = small(3)
    logits, mask = torch.randn(1, 3, 20, 20), torch.randint(0, 3, (1, 20, 20))
    mask[:, 8:] = 255
    loss = head.losses(logits, mask)["loss_edge"]
    errors = F.cross_entropy(logits[:, :, :8], mask[:, :8], reduction="none")
    assert torch.allclose(loss, 20 * (errors * edges(mask[:, :8], 7)).sum() / 400)
    assert head.losses(logits, torch.full_like(mask, 255))["loss_edge"] == 0


def authors_names(name: str) -> str:
    """Return the authors' name of a weight of our segmentor on ViTDet, by the layout of their feature pyramid."""
    part, _, rest = name.partition(".")
    if part == "backbone":
        return f"encoder_net.{rest.removeprefix('net.')}"
    if rest.startswith("predictor."):
        return (
            rest.replace("predictor.", "predict_head.")
            .replace("fuse", "linear_fuse")
            .replace(".predict.", ".linear_predict.")
        )
    _, level, layer, leaf = rest.split(".")
    # Layers before the two convolutions: deconvolution, norm, GELU and deconvolution; deconvolution; none; pooling.
    first = (4, 1, 0, 1)[int(level)] + int(layer) // 2
    return f"featurePyramid_net.simfp_{int(level) + 2}.{first}.{'norm.' if int(layer) % 2 else ''}{leaf}"


def test_weights_of_the_whole_net_load_under_the_authors_names():
    arguments = {"depths": [2], "dim": 32, "heads": 2, "img_size": 64, "map_size": 4, "window": 2}
    cfg = make_config("iml_vit", "vitdet", model__size="base", model__args=arguments)
    data = SimpleNamespace(num_classes=2, in_chans=3)
    first, second = build_segmentor(cfg, data), build_segmentor(cfg, data)
    pyramids = {name for name in first.state_dict() if name.startswith("backbone.pyramid.")}
    levels = {f"backbone.pyramid.levels.{i}": f"featurePyramid_net.simfp_{i + 2}" for i in range(4)}
    state = {
        next(new + name.removeprefix(old) for old, new in levels.items() if name.startswith(f"{old}."))
        if name in pyramids
        else authors_names(name): value
        for name, value in first.state_dict().items()
    }
    assert second.is_whole(state) and not any(name.startswith(("backbone", "decode_head")) for name in state)
    loaded = load_weights(second, state)
    assert not loaded.missing and not loaded.unexpected
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_unfitting_arguments_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"norm must be batch, instance, layer, not 'bach'\. Did you mean 'batch'\?"):
        IMLHead(CHANNELS, 2, norm="bach")
    with pytest.raises(ValueError, match=r"edge_width must be an odd number of pixels, not 6$"):
        IMLHead(CHANNELS, 2, edge_width=6)


def test_the_fifth_level_subsamples_the_fourth():
    head, inputs = small().eval(), {}
    head.predictor.register_forward_pre_hook(lambda _, args: inputs.update(maps=args[0]))
    head(pyramid(CHANNELS, 33, 22))
    maps = inputs["maps"]
    assert [m.shape[2:] for m in maps] == sides(33, 22, 5)
    assert torch.equal(maps[4], maps[3][..., ::2, ::2])
