"""Tests of the detection task, with a detector that knows the truth and with a real one."""

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmdet
import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from mmengine.config import Config
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.scenes import write_scenes
from models.complexity import complexity
from models.openmmlab.detector import Detections
from retinue.runs.training import build_data, build_task
from retinue.tasks.detection import Detection
from tests.retinue.evaluation.test_detection import CATEGORIES, IMAGES, NAMES, ONE, make_truth, predictions
from tests.retinue.runs.test_config import composed

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

# Shift, in pixels, of the detections of each image in tests that need imperfect ones.
SHIFTS = [0, 2, 0, 3, 1, 0]


def recipe(name: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(composed("task=detection", f"recipe={name}").recipe, resolve=True)
    return config


class Oracle(nn.Module):
    """Detector that reads an image's index from its first pixel and returns the true objects, moved by `shifts`."""

    def __init__(self, truth: dict[str, Any], shifts: list[int], masks: bool = True):
        super().__init__()
        self.truth, self.shifts, self.masks = truth, shifts, masks
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone(image)

    def loss(self, image, sizes, boxes, labels, masks, ignored) -> dict[str, Tensor]:
        assert len(boxes) == len(labels) == len(ignored) == len(image) == len(sizes) == len(masks)
        maps = self(image)
        return {"loss_cls": maps.square().mean(), "loss_bbox": maps.abs().mean() + sum(map(len, boxes))}

    def predict(self, image, sizes, original_sizes) -> list[Detections]:
        detections = []
        for pixel, size in zip(image[:, 0, 0, 0].tolist(), original_sizes.tolist(), strict=True):
            prediction = predictions(self.truth, round(pixel), self.shifts[round(pixel)])
            assert tuple(size) == prediction.pop("size")
            masks = prediction["masks"] if self.masks else None
            detections.append(Detections(prediction["boxes"], prediction["scores"], prediction["labels"], masks))
        return detections


class Images:
    """Grey pictures with the sizes of the truth's images."""

    ids = np.array(IMAGES)
    index = SimpleNamespace(federated=None)

    def __init__(self, truth: dict[str, Any]):
        self.truth = truth

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, i: int) -> dict[str, Any]:
        info = self.truth["images"][i]
        return {"image": np.full((info["height"], info["width"], 3), 40 * i, np.uint8)}

    def name(self, i: int) -> str:
        return f"val/{IMAGES[i]}.jpg"


class Data(pl.LightningDataModule):
    """Batches of two images for each rank; the last ones are padded, and the image at `broken` cannot be read."""

    category_ids, class_names, has_masks, in_chans, num_classes = CATEGORIES, NAMES, True, 3, 3
    image_size = (33, 64)

    def __init__(self, truth: dict[str, Any], broken: int | None = None):
        super().__init__()
        self.split, self.broken = Images(truth), broken
        self.positions: dict[str, range] = {}

    def images(self, split: str) -> Images:
        return self.split

    def sets(self, split: str) -> dict[str, range]:
        return self.positions

    def eval_batch(self, positions: list[int]) -> dict[str, Any]:
        image = torch.zeros(len(positions), 3, 32, 32) + torch.tensor(positions).clamp(min=0)[:, None, None, None]
        sizes = [(i["height"], i["width"]) for i in (self.split.truth["images"][max(p, 0)] for p in positions)]
        index = [-1 if position == self.broken else position for position in positions]
        return {
            "image": image, "sizes": torch.tensor([[32, 32]] * len(positions)), "index": torch.tensor(index),
            "original_sizes": torch.tensor(sizes),
        }  # fmt: skip

    def loader(self) -> DataLoader:
        trainer: Any = self.trainer
        world, rank = trainer.world_size, trainer.global_rank
        order = [*range(len(IMAGES)), *[-1] * (-len(IMAGES) % (2 * world))][rank::world]
        return DataLoader([self.eval_batch(order[i : i + 2]) for i in range(0, len(order), 2)], batch_size=None)  # pyright: ignore[reportArgumentType]

    val_dataloader = test_dataloader = loader

    def train_dataloader(self) -> DataLoader:
        batch = self.eval_batch([0, 1])
        boxes = [torch.rand(number, 4) for number in (3, 0)]
        labels = [torch.zeros(number, dtype=torch.int64) for number in (3, 0)]
        masks = [torch.zeros(number, 32, 32, dtype=torch.uint8) for number in (3, 0)]
        ignored = [boxes_of_image[:0] for boxes_of_image in boxes]
        batch |= {"boxes": boxes, "labels": labels, "masks": masks, "ignored": ignored, "seed": 5}
        return DataLoader([batch] * 4, batch_size=None)  # pyright: ignore[reportArgumentType]


def trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def run_test(data: Data, shifts: list[int] = SHIFTS, masks: bool = True, **settings: Any) -> Detection:
    task = Detection(Oracle(data.split.truth, shifts, masks), recipe("coco_1x"), num_classes=3)
    trainer(**settings).test(task, datamodule=data, verbose=False)
    return task


def test_perfect_detections_score_one():
    data = Data(make_truth())
    figures = run_test(data, [0] * 6).test_figures(data)
    assert figures["n"] == 6
    for kind in ("box", "mask"):
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar10", "ar100", "ar_small", "ar_large")
        assert [figures[f"{kind}_{name}"] for name in names] == [ONE] * len(names)
        assert figures[f"{kind}_ar1"] < 1
    assert [list(values.values())[1:] for values in figures["per_class"].values()] == [
        [ONE, ONE, [ONE, ONE], [ONE, ONE]]
    ] * 3
    assert list(figures["per_class"]) == NAMES
    json.dumps(figures, allow_nan=False)


def test_a_validation_computes_the_figures_of_a_test():
    data = Data(make_truth())
    task = run_test(data)
    trainer().validate(task, datamodule=data, verbose=False)
    figures = task.test_figures(data)
    assert 0.1 < figures["mask_ap"] < 0.9
    names = [f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")]
    assert task.val_figures == {f"val/{name}": figures[name] for name in names}
    first = task.val_figures
    # The second validation must not count detections of the first.
    trainer().validate(task, datamodule=data, verbose=False)
    assert task.val_figures == first


def test_a_broken_image_does_not_count():
    data = Data(make_truth(), broken=3)
    figures = run_test(data, [0, 0, 0, 50, 0, 0]).test_figures(data)
    assert (figures["n"], figures["box_ap"]) == (5, ONE)


@pytest.mark.parametrize("without", ["data", "detector"])
def test_only_boxes_are_evaluated_if_data_or_detector_have_no_masks(without, monkeypatch):
    monkeypatch.setattr(Data, "has_masks", without != "data")
    data = Data(make_truth())
    figures = run_test(data, masks=without != "detector").test_figures(data)
    assert "box_ap" in figures and not [name for name in figures if "mask" in name]
    assert set(figures["per_class"]["two"]) == {"n", "box_ap", "box_ap_ci95"}


def test_figures_of_data_without_objects_are_no_numbers():
    truth = make_truth() | {"annotations": []}
    task = run_test(Data(truth))
    trainer().validate(task, datamodule=Data(truth), verbose=False)
    assert math.isnan(task.val_figures["val/box_ap"])
    figures = task.test_figures(Data(truth))
    assert figures["box_ap"] is None and figures["per_class"]["two"]["mask_ap"] is None


class Keep(pl.Callback):
    """Callback that writes the figures of each rank, and the report of the first."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(pl_module.test_figures(data)))
        if trainer.is_global_zero:
            pl_module.write_report(self.folder / "report", data)


def test_two_processes_equal_one(tmp_path):
    data = Data(make_truth())
    task = run_test(data)
    task.write_report(tmp_path / "one", data)
    run_test(data, devices=2, strategy="ddp_fork", callbacks=[Keep(tmp_path)])
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == task.test_figures(data)
    for name in ("detections.json", "pr_curves.png", "per_class.png"):
        assert (tmp_path / "report" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_report_draws_evenly_spread_images(tmp_path):
    data = Data(make_truth())
    task = run_test(data)
    task.save_images = 2
    task.write_report(tmp_path, data)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["val_11.png", "val_300.png"]
    first, second = (np.asarray(Image.open(tmp_path / "images" / f"val_{i}.png")) for i in (300, 11))
    assert min(first.shape[:2]) > 300 and first.shape != second.shape
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {result["image_id"] for result in results} == set(IMAGES[:-1])
    assert {result["category_id"] for result in results} == set(CATEGORIES)
    ids = json.loads((tmp_path / "detection_ids.json").read_text())
    assert ids == {key: data.split.truth[key] for key in ("images", "categories")}
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_training_adds_up_the_losses_and_logs_each():
    data = Data(make_truth())
    task = Detection(Oracle(data.split.truth, SHIFTS), recipe("coco_1x"), num_classes=3)
    before = [weight.clone() for weight in task.model.parameters()]
    trainer(max_epochs=1, limit_train_batches=3).fit(task, datamodule=data)
    figures = task.running_figures()
    assert set(figures) == {"train/loss", "train/loss_cls", "train/loss_bbox"}
    assert figures["train/loss"] == pytest.approx(figures["train/loss_cls"] + figures["train/loss_bbox"])
    assert figures["train/loss_bbox"] > 3
    assert not any(torch.equal(*pair) for pair in zip(before, task.model.parameters(), strict=True))
    assert 0.1 < task.val_figures["val/box_ap"] < 0.9
    assert task.trainer.callback_metrics["val/box_ap"] == pytest.approx(task.val_figures["val/box_ap"])


def test_complexity_counts_a_padded_image():
    data = Data(make_truth())
    task = Detection(Oracle(data.split.truth, SHIFTS), recipe("coco_1x"), num_classes=3)
    assert task.complexity(data) == complexity(task.model, (64, 64)) == (4 * 28, 64 * 64 * 4 * 27)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 4, "val": 1, "test": 2})
    return folder


def real(scenes: Path, head: str = "mask_rcnn") -> tuple[Detection, Any]:
    small = ("model.size=nano", "recipe.batch_size=2", "data.num_workers=0", "data.image_size=[128,160]")
    cfg = composed("task=detection", f"head={head}", f"data.root={scenes}", *small)
    torch.manual_seed(0)
    data = build_data(cfg)
    return build_task(cfg, data), data


def test_mask_rcnn_is_trained_and_tested_on_scenes(scenes, tmp_path):
    task, data = real(scenes)
    before = {name: weight.clone() for name, weight in task.model.named_parameters()}
    trainer(max_epochs=1).fit(task, datamodule=data)
    losses = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    figures = task.running_figures()
    assert set(figures) == {f"train/{name}" for name in ("loss", *losses)}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert not [name for name, weight in task.model.named_parameters() if torch.equal(weight, before[name])]

    trainer().test(task, datamodule=data, verbose=False)
    assert task.test_figures(data)["n"] == 2
    task.save_images = 1
    task.write_report(tmp_path, data)
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {tuple(result["segmentation"]["size"]) for result in results} == {(256, 320)}
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00000.png"]


NO_MASK_HEAD = "+head.args.roi_head.mask_head=null"


@pytest.mark.parametrize(
    ("head", "masks"),
    [
        (["head=retinanet"], False),
        (["head=dino"], False),
        (["head=mask_rcnn"], True),
        (["head=cascade_mask_rcnn"], True),
        (["head=mask_rcnn", NO_MASK_HEAD], False),
    ],
)
def test_data_are_built_to_read_the_masks_that_the_detector_learns(scenes, head, masks):
    cfg = composed("task=detection", "model.size=nano", f"data.root={scenes}", *head)
    data = build_data(cfg)
    before = dict(vars(data))
    with torch.device("meta"):
        detector = Detection.build_net(cfg, data)
    assert data.read_masks == detector.masks == masks
    after = {key: value for key, value in vars(data).items() if key in before}
    assert after == before, "building a net must not change the data module"


def test_parameters_have_the_names_of_the_weights(scenes):
    """Lightning restores a sharded net (FSDP) by the names of its parameters, not by its `load_state_dict`."""
    task, _ = real(scenes)
    names = {name for name, _ in task.named_parameters()}
    assert names <= set(task.state_dict())
    assert {name.split(".")[1] for name in names} == {"backbone", "neck", "rpn_head", "roi_head"}


def test_a_detector_of_boxes_alone_reads_no_masks(scenes):
    for head, masks in (("retinanet", False), ("mask_rcnn", True)):
        task, data = real(scenes, head)
        batch = next(iter(data.train_dataloader()))
        assert ("masks" in batch) == masks and len(batch["boxes"][0]) == len(batch["labels"][0]) > 0
        trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(task, datamodule=data)
        assert task.running_figures()["train/loss"] > 0


def test_the_backbone_starts_from_a_classifier_or_a_detector(scenes, tmp_path):
    classifier = timm.create_model("biformer_nano", num_classes=10)
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in classifier.state_dict().items()}}, tmp_path / "c"
    )
    task, _ = real(scenes)
    head = task.model.state_dict()
    task.start_from(str(tmp_path / "c"), drop_classifier=False)
    net, expected = task.model.backbone.net.state_dict(), classifier.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in net.items())
    assert all(torch.equal(value, head[key]) for key, value in task.model.state_dict().items() if "head" in key)

    torch.save({"state_dict": task.state_dict()}, tmp_path / "d")
    another, _ = real(scenes)
    another.start_from(str(tmp_path / "d"), drop_classifier=False)
    assert all(torch.equal(value, expected[key]) for key, value in another.model.backbone.net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("coco_1x", "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco"),
        ("coco_3x", "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco"),
        ("dino_1x", "dino/dino-4scale_r50_8xb2-12e_coco"),
    ],
)
def test_recipes_equal_those_of_mmdetections_configs(name, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / f"{config}.py")
    ours, optimizer = recipe(name), reference.optim_wrapper.optimizer
    settings = ours["optimizer"]
    assert (ours["epochs"], ours["batch_size"], settings["lr_batch_size"]) == (
        reference.train_cfg.max_epochs,
        16,
        16,
    )
    assert settings["name"] == optimizer.type.lower()
    assert (settings["lr"], settings["weight_decay"]) == (optimizer.lr, optimizer.weight_decay)
    assert settings["betas"] == list(optimizer.get("betas", (0.9, 0.999)))
    keys = reference.optim_wrapper.paramwise_cfg.custom_keys
    assert settings["backbone_factor"] == keys.get("backbone", {}).get("lr_mult")
    assert ours["clip_grad"] == reference.optim_wrapper.get("clip_grad", {}).get("max_norm")
    *warm_up, steps = reference.param_scheduler
    assert (ours["schedule"]["milestones"], ours["schedule"]["gamma"]) == (steps.milestones, steps.gamma)
    if warm_up:
        assert ours["schedule"]["warmup_lr"] == pytest.approx(settings["lr"] * warm_up[0].start_factor)
    else:
        assert ours["schedule"]["warmup_steps"] == 0
    choices = next((step.transforms for step in reference.train_pipeline if step.type == "RandomChoice"), None)
    assert ours["augment"]["detr_crop"] == (choices is not None)
    if choices is not None:
        assert ours["augment"]["sizes"] == [list(scale) for scale in choices[0][0].scales]
