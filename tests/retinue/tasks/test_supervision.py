"""Targets by attention, token labels, views and branches in the task, against loops over their formulas."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from datamodules.mixing import Mix
from ops.functional import split_heads
from ops.losses import Losses
from retinue.tasks.attention_labels import attended_share, attention_targets
from retinue.tasks.classification import Classification
from retinue.tasks.consistency import jensen_shannon
from retinue.tasks.distillation import Teacher, dense_scores
from tests.models.test_backbones import build
from tests.models.test_losses import RECIPE

NO_TEACHER = {"teacher": None}
TOKENS = {"source": "maps", "weight": 0.5, "image_label": "maps"}


def make_task(net: Any, **arguments: Any) -> Classification:
    """Return a task for three classes; `augment` is the recipe's."""
    augment = {"maskmix": {"cell": 16}, "jsd": None} | arguments.pop("augment", {})
    recipe = RECIPE | {"augment": RECIPE["augment"] | augment}
    settings: dict[str, Any] = {"distillation": NO_TEACHER, **arguments}
    task = Classification(net.train(), recipe, num_classes=3, **settings)
    task.trainer = cast(Any, SimpleNamespace(datamodule=None, global_step=0))
    return task


def make_batch(kind: str | None = "maskmix", side: int = 64) -> dict[str, Any]:
    """Return four images, of which each keeps two or three quarters of its 16 patches of 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.zeros(4, 16)
    for i in range(4):
        cells[i, torch.randperm(16, generator=generator)[: 8 if kind == "maskmix" else 12]] = 1
    own = cells.view(4, 1, 4, 4).repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)
    mix = Mix(kind, torch.tensor([1, 2, 3, 0]), own, float(cells[0].mean()))
    label = torch.tensor([0, 2, 1, 1])
    image = torch.randn(4, 3, side, side, generator=generator)
    return {"image": image, "label": label, "mix": mix, "target": mix.targets(label, 3, 0.1)}


def test_the_attention_is_that_of_the_class_token_in_the_last_block():
    net = build("deit_tiny", num_classes=3, depths=(2,)).eval()
    x, losses = torch.randn(2, 3, 64, 80), Losses(wants_attention=True)
    scores, values = net.forward_with_losses(x, losses=losses)
    assert torch.equal(scores, net(x)) and not values
    block, tokens = net.blocks[1], net.run(x, blocks=1)[0]
    q, k, _ = split_heads(block.mixer.qkv(block.norm1(tokens)), 9).chunk(3, dim=1)
    rows = [[(q[b, h, 0] @ k[b, h].T / 8).softmax(-1)[1:] for h in range(3)] for b in range(2)]
    expected = torch.stack([torch.stack(heads).mean(0) for heads in rows])
    assert losses.attention is not None and not losses.attention.requires_grad
    torch.testing.assert_close(losses.attention, expected, atol=1e-6, rtol=0)


def test_recomputation_hands_out_the_same_attention():
    net = build("deit_tiny", num_classes=3, depths=(2,)).train()
    x, found = torch.randn(2, 3, 64, 64), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        losses = Losses(wants_attention=True)
        net.forward_with_losses(x, losses=losses)[0].sum().backward()
        found.append(losses.attention)
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "mixed"), [("transmix", "cutmix"), ("mixpro", "maskmix"), ("mixpro", "cutmix")])
def test_targets_by_attention(kind, mixed):
    batch, logits = make_batch(mixed), torch.randn(4, 3)
    attention = torch.rand(4, 16)
    share = attended_share(batch["mix"], attention, (4, 4))
    found = attention_targets(kind, batch["mix"], batch["label"], batch["target"], logits, share, 0.1)
    for i in range(4):
        j, own = int(batch["mix"].partner[i]), batch["mix"].own[i, 0, ::16, ::16].flatten()
        attended = sum(float(own[n] * attention[i, n]) for n in range(16)) / float(attention[i].sum())
        area, p = batch["mix"].share, logits[i].softmax(0)
        labels = [F.one_hot(batch["label"][k], 3).float() for k in (i, j)]
        smooth = [0.9 * label + 0.1 / 3 for label in labels]
        by_area = area * smooth[0] + (1 - area) * smooth[1]
        if kind == "transmix":
            mean = (area + attended) / 2
            expected = mean * smooth[0] + (1 - mean) * smooth[1]
        elif mixed == "maskmix":
            agreement = float(by_area @ p / (by_area.norm() * p.norm()))
            mean = agreement * attended + (1 - agreement) * area
            expected = mean * labels[0] + (1 - mean) * labels[1]
        else:
            expected = by_area
        torch.testing.assert_close(found[i], expected, atol=1e-6, rtol=0)


def test_without_a_difference_in_attention_the_labels_are_those_of_the_area():
    batch = make_batch("maskmix")
    share = attended_share(batch["mix"], torch.full((4, 16), 0.05), (4, 4))
    hard = batch["mix"].targets(batch["label"], 3, 0.0)
    found = attention_targets("mixpro", batch["mix"], batch["label"], batch["target"], torch.randn(4, 3), share, 0.1)
    torch.testing.assert_close(found, hard)
    blended = batch["mix"]._replace(kind="mixup", own=torch.full((4, 1, 64, 64), 0.7), share=0.7)
    share = attended_share(blended, torch.rand(4, 16), (4, 4))
    target = blended.targets(batch["label"], 3, 0.1)
    found = attention_targets("transmix", blended, batch["label"], target, torch.randn(4, 3), share, 0.1)
    torch.testing.assert_close(found, target)


@pytest.mark.parametrize("kind", ["transmix", "mixpro"])
def test_a_step_learns_from_targets_by_attention(kind):
    net = build("deit_tiny", num_classes=3, depths=(2,), img_size=64)
    task, batch = make_task(net, mixed_labels=kind), make_batch()
    loss = task.training_step(batch, 0)
    losses = Losses(wants_attention=True)
    logits, _ = net.forward_with_losses(batch["image"], losses=losses)
    assert losses.attention is not None
    share = attended_share(batch["mix"], losses.attention, (4, 4))
    target = attention_targets(kind, batch["mix"], batch["label"], batch["target"], logits, share, 0.1)
    assert torch.allclose(loss, -(target * logits.log_softmax(1)).sum(1).mean())
    assert not torch.allclose(loss, F.cross_entropy(logits, batch["target"]))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["swin_nano", "fan_tiny"])
def test_nets_without_a_class_token_in_attention_are_refused(name):
    with pytest.raises(ValueError, match=r"task.mixed_labels=transmix needs a plain net with a class token"):
        make_task(build(name, num_classes=3), mixed_labels="transmix")


@pytest.mark.parametrize("reduce_at", [[0], [1]])
def test_nets_that_drop_tokens_are_refused(reduce_at):
    net = build("evit_small", num_classes=3, img_size=64, depths=(2,), reduce_at=reduce_at)
    with pytest.raises(ValueError, match=r"needs a net that keeps all tokens"):
        make_task(net, mixed_labels="transmix")


def test_jensen_shannon_by_its_definition():
    logits = torch.randn(6, 5, dtype=torch.float64)
    total = 0.0
    for i in range(2):
        p = [logits[view * 2 + i].softmax(0) for view in range(3)]
        mean = sum(p) / 3
        total += sum(float((q * (q / mean).log()).sum()) for q in p) / 3 / 2
    assert float(jensen_shannon(logits, 3)) == pytest.approx(total, rel=1e-5)
    assert float(jensen_shannon(logits[:2].repeat(3, 1), 3)) == pytest.approx(0, abs=1e-7)
    # The largest divergence is that of three certain predictions that differ.
    assert float(jensen_shannon(1e4 * torch.eye(3), 3)) == pytest.approx(math.log(3), rel=1e-5)


def test_a_step_with_views():
    net = build("swin_nano", num_classes=3)
    task = make_task(net, augment={"jsd": 12.0})
    image, views = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 32, 32)
    label = torch.tensor([0, 2])
    loss = task.training_step({"image": image, "altered": views, "label": label}, 0)
    logits = net(torch.cat([image, views]))
    expected = F.cross_entropy(logits[:2], label, label_smoothing=0.1) + 12 * jensen_shannon(logits, 3)
    assert torch.allclose(loss, expected)
    assert set(task.running_figures()) == {"train/loss", "train/top1", "train/jsd"}


def token_batch(mixed: bool) -> dict[str, Any]:
    """Return a batch with label maps of 2 x 2 cells that list every class."""
    batch = make_batch()
    scores = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(3).view(1, 3, 1, 1).expand(4, 3, 2, 2)
    view = torch.eye(2, 3).expand(4, 2, 3)
    batch |= {"map_scores": scores, "map_labels": labels, "map_view": view}
    return batch if mixed else {key: value for key, value in batch.items() if key not in ("mix", "target")}


TOKEN_NETS = {
    "lvvit_tiny": {"img_size": 64, "depths": (1,)},
    "uniformer_small": {"token_label": True, "depths": (1, 1, 1, 1)},
    "spectformer_h_small": {"img_size": 64, "depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize(
    ("name", "mixed"),
    [("lvvit_tiny", True), ("lvvit_tiny", False), ("uniformer_small", True), ("spectformer_h_small", True)],
)
def test_a_step_with_label_maps(name, mixed):
    net = build(name, num_classes=3, drop_path_rate=0.0, **TOKEN_NETS[name])
    task, batch = make_task(net, token_labels=TOKENS), token_batch(mixed)
    torch.manual_seed(2)
    loss = task.training_step(batch, 0)
    torch.manual_seed(2)
    features = net.forward_features(batch["image"])
    side = 64 // net.feature_info[-1]["reduction"]
    own = F.avg_pool2d(batch["mix"].own, 64 // side) if mixed else torch.ones(4, 1, side, side)
    dense, image = 0.0, 0.0
    for i in range(4):
        j = int(batch["mix"].partner[i]) if mixed else i
        maps = [F.interpolate(batch["map_scores"][k : k + 1], (2 * side, 2 * side), mode="bilinear") for k in (i, j)]
        maps = [F.avg_pool2d(m, 2)[0] for m in maps]
        logits = net.token_classifier(net.map_tokens(features))[i].log_softmax(1)
        for n in range(side * side):
            soft = [0.9 * m[:, n // side, n % side].softmax(0) + 0.1 / 3 for m in maps]
            m = own[i, 0, n // side, n % side]
            dense = dense - float((m * soft[0] + (1 - m) * soft[1]) @ logits[n].detach()) / (4 * side * side)
        soft = [0.9 * m.mean((1, 2)).softmax(0) + 0.1 / 3 for m in maps]
        share = batch["mix"].share if mixed else 1.0
        pooled = net.head(net.global_pool(features))[i].log_softmax(0)
        image = image - float((share * soft[0] + (1 - share) * soft[1]) @ pooled.detach()) / 4
    assert float(loss) == pytest.approx(image + 0.5 * dense, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_token_labels_need_all_tokens():
    net = build("evit_lvvit_small", num_classes=3, img_size=64, depths=(1,), reduce_at=[0])
    with pytest.raises(ValueError, match=r"token labels need a net that keeps all tokens.* 16 tokens have labels"):
        make_task(net, token_labels=TOKENS).training_step(token_batch(False), 0)


def test_token_labels_with_the_datas_label_for_the_image():
    net = build("lvvit_tiny", num_classes=3, depths=(1,), img_size=64)
    batch = token_batch(False)
    loss = make_task(net, token_labels=TOKENS | {"image_label": "truth", "weight": 0.0}).training_step(batch, 0)
    scores = net.head(net.forward_features(batch["image"])[:, 0])
    assert torch.allclose(loss, F.cross_entropy(scores, batch["label"], label_smoothing=0.1))


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "deit_tiny_patch16_224",
        pytest.param("convnext_atto", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    ],
)
def test_a_heads_scores_of_the_places_of_a_map(name):
    """The score of a place is that of an image whose features are this place's everywhere."""
    torch.manual_seed(0)
    size: Any = {} if name in ("resnet10t", "convnext_atto") else {"img_size": 64}
    net: Any = timm.create_model(name, num_classes=3, **size).eval()
    with torch.inference_mode():
        features = net.forward_features(torch.randn(2, 3, 64, 64))
        scores = dense_scores(net, features, (64, 64))
        side = scores.shape[-1]
        assert scores.shape == (2, 3, side, side) and side == (4 if "deit" in name else 2)
        for y in range(side):
            for x in range(side):
                if features.ndim == 3:
                    uniform = features[:, 1 + y * side + x].unsqueeze(1).expand_as(features)
                elif name.startswith("swin"):
                    uniform = features[:, y, x][:, None, None].expand_as(features)
                else:
                    uniform = features[:, :, y, x][..., None, None].expand_as(features)
                torch.testing.assert_close(scores[..., y, x], net.forward_head(uniform), atol=1e-5, rtol=0)


def test_a_teacher_labels_the_tokens_of_the_mixed_images():
    net, batch = build("lvvit_tiny", num_classes=3, depths=(1,), img_size=64), make_batch()
    teacher = {"teacher": "resnet10t", "weights": "unused", "mode": "soft", "alpha": 0.0, "temperature": 1.0}
    task = make_task(net, token_labels=TOKENS | {"source": "teacher"}, distillation=teacher)
    task.trainer = cast(
        Any, SimpleNamespace(datamodule=SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3), global_step=0)
    )
    torch.manual_seed(1)
    teacher_net: Any = timm.create_model("resnet10t", num_classes=3).eval()
    assert task.teacher is not None
    task.teacher.__dict__["net"] = teacher_net
    task.teacher.__dict__["preprocessing"] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 64}
    loss = task.training_step(batch, 0)
    maps = F.interpolate(
        dense_scores(teacher_net, teacher_net.forward_features(batch["image"]), (64, 64)), (4, 4), mode="bilinear"
    )
    labels = smooth(maps.flatten(2).transpose(1, 2).softmax(-1))
    features = net.forward_features(batch["image"])
    tokens = -(labels * net.aux_head(features[:, 1:]).log_softmax(-1)).sum(-1).mean()
    image = -(smooth(maps.mean((2, 3)).softmax(-1)) * net.head(features[:, 0]).log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(loss, image + 0.5 * tokens, atol=1e-5)


def test_loading_the_teacher_draws_no_random_numbers_of_the_training(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    teacher = Teacher(
        teacher="resnet10t",
        weights=str(tmp_path / "teacher.pth"),
        mode="soft",
        alpha=0.5,
        temperature=1.0,
        num_classes=3,
    )
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert not teacher.net.training
    assert torch.equal(torch.rand(3), expected)


def smooth(p: torch.Tensor) -> torch.Tensor:
    """Return probabilities of three classes with a smoothing of 0.1."""
    return 0.9 * p + 0.1 / 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("deit_tiny", {"token_labels": TOKENS}, "task.token_labels needs a net with a classifier of tokens"),
        ("uniformer_small", {"token_labels": TOKENS}, "task.token_labels needs a net with a classifier of tokens"),
        (
            "lvvit_tiny",
            {"token_labels": TOKENS | {"source": "teacher"}},
            "source=teacher needs task.distillation.teacher",
        ),
        (
            "lvvit_tiny",
            {"token_labels": TOKENS, "augment": {"jsd": 1.0}},
            "recipe.augment.jsd has views .* task.token_labels",
        ),
        ("dcal_tiny", {"mixed_labels": "mixpro"}, "task.mixed_labels is for nets of one branch"),
        (
            "deit_tiny",
            {"mixed_labels": "mixpro", "augment": {"maskmix": None, "cutmix": 1.0}},
            "=mixpro needs mixed images",
        ),
        ("deit_tiny", {"mixed_labels": "transmix", "augment": {"maskmix": None}}, "=transmix needs mixed images"),
        ("lvvit_tiny", {"mixed_labels": "mixpro", "token_labels": TOKENS}, "needs task.token_labels.image_label=truth"),
        ("dcal_tiny", {"augment": {"jsd": 1.0}}, "recipe.augment.jsd has views .* a net of several branches"),
    ],
)
def test_what_does_not_fit_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(build(name, num_classes=3, depths=(1, 1, 1, 1) if name == "uniformer_small" else (1,)), **arguments)


def test_a_step_of_a_net_with_branches_weighs_their_losses_by_uncertainty():
    net = build("dcal_tiny", num_classes=3, depths=(2,), img_size=64)
    task, batch = make_task(net), make_batch()
    nn.init.normal_(net.uncertainty)
    loss = task.training_step(batch, 0)
    w = net.uncertainty.detach()
    losses = [-(batch["target"] * scores.log_softmax(1)).sum(1).mean() for scores in net(batch["image"])]
    expected = torch.stack([(-w[i]).exp() * losses[i] / 2 + w[i] / 2 for i in range(3)]).sum()
    assert torch.allclose(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    task.eval()
    assert task(batch["image"]).shape == (4, 3)
