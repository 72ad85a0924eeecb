"""Tests of the segmentation task, with a net and data for which the right result is known."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from retinue.evaluation.segmentation import areas, confusion_matrix, figures
from retinue.tasks.optimization import create_optimizer, create_schedule, total_epochs
from retinue.tasks.segmentation import Inference, Segmentation, windows
from retinue.utils.paths import CONF

K = 4
NAMES = ("wall", "sky", "tree", "road")


class Truthful(nn.Module):
    """Segmentor of images whose first channel is the mask: its logits are 5 for the true class and 0 for the others.

    Noise of size `noise` is added to the logits. It follows from the image alone.
    """

    def __init__(self, noise: float = 0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.noise = noise
        # Shapes of the images that the net has seen.
        self.shapes: list[tuple[int, ...]] = []

    def logits(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape))
        scores = self.scale * F.one_hot(image[:, 0].round().clamp(0, K - 1).long(), K).permute(0, 3, 1, 2)
        return scores + self.noise * torch.stack([torch.sin(7 * (i + 1) * image[:, 1]) for i in range(K)], 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image)

    def loss(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits = self.logits(image)
        entropy = F.cross_entropy(logits, mask, ignore_index=255)
        return {"decode.loss_ce": entropy, "aux.loss_ce": 0.4 * entropy}

    def set_progress(self, share: float) -> None:
        pass


class Images:
    """Striped masks of two sizes, with ignored upper rows, and images that show the masks.

    The first and last channel of an image is its complete mask, smaller by the factor `shrink`; the second is noise.
    """

    def __init__(self, count: int, shrink: int = 1):
        rng = np.random.default_rng(0)
        self.masks, self.images = [], []
        for i in range(count):
            stripes = rng.integers(0, K, (1, 8 if i % 2 else 5)).astype(np.uint8)
            self.masks.append(stripes.repeat(48, 0).repeat(8, 1))
            small = self.masks[-1][::shrink, ::shrink].astype(np.float32)
            self.images.append(np.stack([small, rng.random(small.shape, np.float32), small]))

    def __len__(self) -> int:
        return len(self.masks)

    def name(self, index: int) -> str:
        return f"park/{index:03d}.jpg"

    def stem(self, index: int) -> str:
        return f"park/{index:03d}"

    def __getitem__(self, index: int) -> dict:
        mask = self.masks[index].copy()
        mask[:3] = 255
        return {"image": np.full((*mask.shape, 3), 60, np.uint8), "mask": mask}

    def batch(self, positions: list[int]) -> dict[str, Any]:
        """Return an evaluation batch; an index of -1 is padding and repeats the last image."""
        samples = [(self.images[i], self[i]["mask"]) for i in positions]
        return {
            "image": [torch.from_numpy(image) for image, _ in samples],
            "mask": [torch.from_numpy(mask).long() for _, mask in samples],
            "original_sizes": torch.tensor([mask.shape for _, mask in samples]),
            "index": torch.tensor(positions),
        }


class Data(pl.LightningDataModule):
    class_names, num_classes, image_size, in_chans, background = NAMES, K, (48, 64), 3, 0

    def __init__(self, count: int, batch_size: int, shrink: int = 1, padding: int = 0):
        super().__init__()
        self.set = Images(count, shrink)
        order = [*range(count), *[-1] * padding]
        self.batches = [self.set.batch(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]

    def images(self, split: str) -> Images:
        return self.set

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches_of_rank = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(batches_of_rank, batch_size=None)  # pyright: ignore[reportArgumentType]

    test_dataloader = val_dataloader


def make_task(net: nn.Module | None = None, figures: str | None = None, **test: Any) -> Segmentation:
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "task/segmentation.yaml"))
    recipe = {"optimizer": {"name": "adamw"}, "schedule": {"kind": "cosine"}}
    return Segmentation(net or Truthful(), recipe, num_classes=K, test=config["test"] | test, figures=figures)


def evaluated(task: Segmentation, data: Data, devices: int = 1) -> dict[str, Any]:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = "ddp" if devices > 1 else "auto"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.validate(task, datamodule=data, verbose=False)
    trainer.test(task, datamodule=data, verbose=False)
    return task.test_figures(data)


@pytest.mark.parametrize("shrink", [1, 4])
@pytest.mark.parametrize("test", [{}, {"mode": "slide", "crop": [8, 8], "stride": [4, 6]}, {"flip": True}])
def test_perfect_predictions_score_one_at_the_original_size(test, shrink):
    task = make_task(**test)
    summary = evaluated(task, Data(5, 2, shrink))
    assert summary["miou"] == summary["pixel_accuracy"] == summary["mean_accuracy"] == 1
    assert summary["n"] == 5
    assert task.val_figures == {"val/miou": 1.0, "val/pixel_accuracy": 1.0, "val/mean_accuracy": 1.0}


def test_sums_of_a_checkpoint_move_to_the_training_device(monkeypatch):
    """NCCL reduces no tensors on the CPU, and the net is still on the CPU when a checkpoint is read."""
    task = make_task()
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    monkeypatch.setattr(Segmentation, "trainer", trainer)
    task.on_load_checkpoint({"train_sums": {"loss": torch.tensor(3.0), "images": torch.tensor(4.0)}})
    assert {name: value.device.type for name, value in task._sums.items()} == {"loss": "meta", "images": "meta"}


def test_figures_are_computed_from_the_pixels_of_all_images_together():
    net, data = Truthful(noise=8.0), Data(6, 4)
    task = make_task(net)
    summary = evaluated(task, data)
    confusion = np.zeros((K, K), np.int64)
    for i, image in enumerate(data.set.images):
        prediction = net.logits(torch.from_numpy(image)[None])[0].argmax(0)
        confusion += confusion_matrix(prediction, torch.from_numpy(data.set[i]["mask"]), K).numpy()
    expected = figures(areas(confusion))
    assert 0.2 < expected["miou"] < 0.9
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert task.val_figures == pytest.approx({f"val/{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("test", [{}, {"mode": "slide", "crop": [32, 32], "stride": [16, 16], "flip": True}])
def test_neither_the_batch_nor_padding_changes_the_figures(test):
    expected = evaluated(make_task(Truthful(8.0), **test), Data(5, 1))
    assert expected["miou"] < 0.9
    assert (
        expected
        == evaluated(make_task(Truthful(8.0), **test), Data(5, 4))
        == evaluated(make_task(Truthful(8.0), **test), Data(5, 4, padding=3))
    )


def evaluate_rank(rank: int, folder: Path, port: int) -> None:
    """Evaluate in one of two processes, and write the figures and the indices of the pictures."""
    # OpenMP hangs after a fork.
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    task = make_task(Truthful(8.0), figures="medical")
    task.save_images = 5
    summary = evaluated(task, Data(5, 1, padding=1), devices=2)
    (folder / f"{rank}.json").write_text(json.dumps([summary, task.val_figures, sorted(task.pictures)]))


@pytest.fixture
def two_classes(monkeypatch):
    monkeypatch.setitem(globals(), "K", 2)
    monkeypatch.setattr(Data, "class_names", NAMES[:2])


def test_two_classes_have_the_figures_of_manipulated_pixels(two_classes):
    task, data = make_task(Truthful(noise=8.0)), Data(5, 2, padding=1)
    summary = evaluated(task, data)
    f1s, aucs = [], []
    for i, image in enumerate(data.set.images):
        scores = task.model.logits(torch.from_numpy(image)[None])[0].detach().numpy()[:, 3:]
        mask, predicted = data.set.masks[i][3:] == 1, scores[1] > scores[0]
        f1s.append(2 * (mask & predicted).sum() / (mask.sum() + predicted.sum()))
        aucs.append((scores[1] - scores[0])[mask][:, None] > (scores[1] - scores[0])[~mask])
    assert summary["pixel_f1"] == pytest.approx(np.mean(f1s))
    assert summary["pixel_auc"] == pytest.approx(np.mean([wins.mean() for wins in aucs]), abs=1e-6)
    assert 0.5 < summary["pixel_auc"] < 1 and summary["pixel_f1_ci95"][0] < summary["pixel_f1"] < 1
    assert {"miou", "pixel_f1", "pixel_auc"} <= set(summary["ci_methods"])


@pytest.mark.parametrize("classes", [K, 2])
def test_two_processes_equal_one(classes: int, tmp_path: Path, request: pytest.FixtureRequest):
    if classes == 2:
        request.getfixturevalue("two_classes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(evaluate_rank, (tmp_path, port), nprocs=2, start_method="fork")
    task = make_task(Truthful(8.0), figures="medical")
    summary = evaluated(task, Data(5, 1))
    for number in range(2):
        parallel, val_figures, pictures = json.loads((tmp_path / f"{number}.json").read_text())
        assert parallel == summary and pictures == [0, 1, 2, 3, 4]
        # Sums of rates over images depend on their order by rounding.
        assert val_figures == pytest.approx(task.val_figures, rel=1e-12)


def test_medical_figures_of_a_validation_and_a_test():
    """The net predicts no road, so in each image with road its Dice is 0 and its HD95 the diagonal."""
    task, data = make_task(figures="medical"), Data(4, 2)
    with torch.no_grad():
        for image in data.set.images:
            image[0][image[0] == 3] = 2
    summary = evaluated(task, data)
    assert summary["per_class"]["sky"] | {"dice": 1, "hd95": 0, "sensitivity": 1} == summary["per_class"]["sky"]
    road, sizes = summary["per_class"]["road"], [mask.shape for mask in data.set.masks if (mask == 3).any()]
    assert road["dice"] == road["image_iou"] == road["sensitivity"] == 0 and road["specificity"] == 1
    assert road["hd95"] == pytest.approx(np.mean([np.hypot(*size) for size in sizes]))
    assert summary["dice"] == pytest.approx(np.mean([summary["per_class"][name]["dice"] for name in NAMES[1:]]))
    for name in ("dice", "image_iou", "sensitivity", "specificity"):
        assert task.val_figures[f"val/{name}"] == pytest.approx(summary[name])


def test_losses_are_added_up_and_tracked_by_name():
    task, data = make_task(), Images(4)
    task.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    images = torch.stack([torch.from_numpy(data.images[i]) for i in (1, 3)])
    masks = torch.stack([torch.from_numpy(data.masks[i]).long() for i in (1, 3)])
    loss = task.training_step({"image": images, "mask": masks}, 0)
    tracked = task.running_figures()
    assert tracked["train/loss"] == pytest.approx(float(loss.detach()))
    assert tracked["train/aux.loss_ce"] == pytest.approx(0.4 * tracked["train/decode.loss_ce"])
    assert tracked["train/loss"] == pytest.approx(1.4 * tracked["train/decode.loss_ce"])
    loss.backward()
    # Larger logits of the true class lower the loss.
    assert float(task.model.scale.grad) < 0  # pyright: ignore[reportArgumentType]


def test_windows_cover_a_side_and_end_with_the_image():
    assert windows(10, 4, 3) == [(0, 4), (3, 7), (6, 10)]
    assert windows(11, 4, 3) == [(0, 4), (3, 7), (6, 10), (7, 11)]
    assert windows(4, 4, 3) == windows(4, 9, 3) == [(0, 4)]
    assert windows(2048, 512, 341) == [(start, start + 512) for start in (0, 341, 682, 1023, 1364, 1536)]


def test_logits_of_windows_are_averaged_where_they_overlap():
    """The logits of a window are its number, from 1."""
    crops = []

    def logits(image: Tensor) -> Tensor:
        crops.append(image[0, 0].clone())
        return torch.full((1, 1, *image.shape[2:]), float(len(crops)))

    image = torch.arange(15.0).view(1, 3, 5)
    scores = Inference(mode="slide", crop=(2, 3), stride=(2, 2))(logits, image, (3, 5))
    # Windows 1 and 2 are rows 0 to 1, windows 3 and 4 rows 1 to 2; the columns are 0 to 2 and 2 to 4.
    assert scores[0].tolist() == [[1, 1, 1.5, 2, 2], [2, 2, 2.5, 3, 3], [3, 3, 3.5, 4, 4]]
    assert crops[3].tolist() == [[7, 8, 9], [12, 13, 14]]


def test_one_window_or_one_scale_equals_the_whole_image():
    net = Truthful(noise=3.0)
    image = torch.from_numpy(Images(1).images[0])
    whole = Inference()(net.logits, image, (50, 70))
    assert torch.equal(Inference(mode="slide", crop=(48, 40), stride=(10, 10))(net.logits, image, (50, 70)), whole)
    assert torch.equal(Inference(mode="slide", crop=(90, 90), stride=(90, 90))(net.logits, image, (50, 70)), whole)
    assert torch.equal(Inference(scales=[1.0])(net.logits, image, (50, 70)), whole)
    expected = F.interpolate(net.logits(image[None]), (50, 70), mode="bilinear", align_corners=False)[0]
    assert torch.equal(whole, expected)


def test_views_are_averaged_after_the_softmax():
    """The net's logits depend on the column and on the height, so wrong mirroring or scaling would show."""

    def logits(image: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, image.shape[3]).expand(image.shape[2], -1)
        return torch.stack([ramp * image.shape[2], image[0, 0]])[None]

    image = torch.rand(3, 10, 16, generator=torch.Generator().manual_seed(0))
    scores = Inference(scales=[1.0, 1.5], flip=True)(logits, image, (10, 16))
    expected = torch.zeros(2, 10, 16)
    for scale in (1.0, 1.5):
        size = (int(10 * scale), int(16 * scale))
        view = F.interpolate(image[None], size, mode="bilinear", align_corners=False)
        for mirrored in (False, True):
            out = logits(view.flip(3)).flip(3) if mirrored else logits(view)
            expected += F.interpolate(out, (10, 16), mode="bilinear", align_corners=False)[0].softmax(0)
    torch.testing.assert_close(scores, expected)
    assert torch.allclose(scores.sum(0), torch.full((10, 16), 4.0))


def test_images_are_enlarged_to_multiples():
    net, image = Truthful(), torch.from_numpy(Images(1).images[0])  # 48 x 40
    Inference(multiple=32, scales=[1.0, 0.5])(net.logits, image, (48, 40))
    assert [shape[2:] for shape in net.shapes] == [(64, 64), (32, 32)]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"mode": "silde"}, r"task.test.mode must be whole or slide, not 'silde'.*slide"),
        ({"stride": [600, 341]}, r"a stride from 1 to the crop's side; not \[512, 512\] and \[600, 341\]"),
        ({"crop": [512]}, r"are \[height, width\]"),
        ({"scales": []}, "must be factors above 0"),
        ({"multiple": 0}, "must be null or a number of pixels, not 0"),
    ],
)
def test_wrong_inference_settings_are_refused(test, message):
    with pytest.raises(ValueError, match=message):
        make_task(**test)


def test_the_report_has_tables_and_pictures(tmp_path: Path):
    task, data = make_task(Truthful(noise=8.0)), Data(9, 2, padding=1)
    task.save_images = 3
    evaluated(task, data)
    task.write_report(tmp_path, data)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    pictures = [f"images/park_{index:03d}.png" for index in (0, 3, 6)]
    assert written == ["confusion.csv", "confusion.png", *pictures, "iou.csv", "per_class.png"]


def test_the_maps_have_the_names_and_values_of_masks(tmp_path: Path):
    task, data = make_task(Truthful(noise=8.0)), Data(4, 2, padding=1)
    task.save_images = 4
    task.predictions_folder = tmp_path
    data.set.mask_values = np.arange(K, dtype=np.uint8) + 1  # pyright: ignore[reportAttributeAccessIssue]
    evaluated(task, data)
    task.write_report(tmp_path, data)
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["park"]
    meanings = json.loads((tmp_path / "map_classes.json").read_text())
    assert [(meaning["value"], meaning["name"]) for meaning in meanings] == list(enumerate(NAMES, 1))
    for index, prediction in task.pictures.items():
        with Image.open(tmp_path / f"maps/park/{index:03d}.png") as image:
            np.testing.assert_array_equal(np.array(image), prediction + 1)
            colours = np.array(image.convert("RGB"))
        for meaning in meanings:
            assert (colours[prediction + 1 == meaning["value"]] == meaning["color"]).all()


RECIPES = (
    "ade20k_80k", "ade20k_160k", "eomt_31e", "linear_40k", "mask2former_160k", "segformer_160k", "vwformer_160k",
    "iml_vit", "small_segmentation",
)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_compose_and_drive_optimiser_and_schedule(name):
    with initialize_config_dir(str(CONF / "recipe"), version_base=None):
        recipe: Any = OmegaConf.to_container(compose(name))
    assert (recipe["steps"] is None) != (recipe["epochs"] is None)
    net = nn.Module()
    net.backbone, net.head = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = create_optimizer(net, recipe)
    schedule = create_schedule(optimizer, recipe, steps_per_epoch=1000)
    total = 1000 * total_epochs(recipe, 1000)
    rates = []
    warmup = recipe["schedule"]["warmup_steps"]
    # Without a number of steps, the warm-up is a number of epochs.
    warmup = 1000 * recipe["schedule"]["warmup_epochs"] if warmup is None else warmup
    for step in (0, warmup, total // 2, total - 1):
        schedule.step_update(step)
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    # A decay counts from the first step, so some of it is over after the warm-up.
    assert rates[1] == pytest.approx(recipe["optimizer"]["lr"], rel=0.05)
    assert rates[1] > rates[2] > rates[3]
    assert rates[3] < 0.02 * rates[1]
