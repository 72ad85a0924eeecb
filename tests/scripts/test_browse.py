"""Pictures of batches show what the net receives; the plotted schedule is the run's."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.scenes import write_scenes
from retinue.runs import browse as module
from retinue.runs.browse import schedule_of, to_pixels, views_of
from retinue.runs.training import build_data
from scripts import browse
from tests.retinue.runs.cli import CommandLine, rows
from tests.retinue.runs.test_config import composed

DIGITS = ("data=digits", "data.image_size=16", "trainer=cpu", "data.num_workers=0")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, {"train": 4, "val": 2, "test": 2})
    return folder


def drawn(monkeypatch, arguments, out):
    """Run the command, and return the views of each picture by its name."""
    views = {}
    draw = module.draw_views
    monkeypatch.setattr(module, "draw_views", lambda path, title, of_batch, names: (
        views.update({path.name: of_batch}), draw(path, title, of_batch, names)
    ))  # fmt: skip
    browse.main([*arguments, f"out={out}"])
    return views


def test_the_batches_are_those_of_the_run_with_their_mixed_targets(monkeypatch, tmp_path, capsys):
    keys = ("recipe.augment.cutmix=1.0", "recipe.augment.erasing=0.5", "recipe.batch_size=16")
    views = drawn(monkeypatch, [*DIGITS, *keys, "batches=2", "images=5", "epoch=3"], tmp_path / "out")
    names = ["train-1.png", "train-2.png", "val-1.png", "val-2.png"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert printed == [str(tmp_path / "out" / name) for name in (*names, "schedule.png")]
    assert list(views) == names and [len(of_batch) for of_batch in views.values()] == [5] * 4
    for name in (*names, "schedule.png"):
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 10

    cfg = composed(*DIGITS, *keys)
    module.resolve_preprocessing(cfg)
    data = build_data(cfg)
    loader = data.train_dataloader()
    loader.set_epoch(3)
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    pixels = batch["image"].permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean)
    for i, view in enumerate(views["train-1.png"]):
        np.testing.assert_allclose(view.image, (255 * pixels[i]).clamp(0, 255), atol=0.51)
        for part in view.caption.split(", "):
            name, share = part.split()
            assert float(share) == pytest.approx(batch["target"][i, int(name)].item(), abs=0.006)


@pytest.mark.parametrize("task", ["detection", "segmentation", "multi_label"])
def test_boxes_masks_and_labels_are_drawn(task, scenes, monkeypatch, tmp_path):
    keys = (f"task={task}", f"data.root={scenes}", "data.num_workers=0", "recipe.batch_size=2", "trainer=cpu")
    views = drawn(monkeypatch, [*keys, "batches=1"], tmp_path)
    for name in ("train-1.png", "val-1.png"):
        for view in views[name]:
            if task == "detection":
                height, width = view.image.shape[:2]
                assert len(view.boxes) == len(view.labels) > 0
                assert (view.boxes >= -1e-3).all() and (view.boxes <= [width + 1e-3, height + 1e-3] * 2).all()
                # A digit is lighter than the photo around it.
                for x1, y1, x2, y2 in view.boxes.astype(int).tolist():
                    assert view.image[y1 : y2 + 1, x1 : x2 + 1].max() > 120
            elif task == "segmentation":
                image, coloured = np.split(view.image, 2, 1)
                assert (image != coloured).any()
            else:
                assert set(view.caption.split(", ")) <= set("0123456789")
    if task == "detection":
        assert views["train-1.png"][0].masks is not None


def test_the_schedule_is_that_of_a_run(capfd, monkeypatch, tmp_path):
    cli = CommandLine(capfd, monkeypatch, tmp_path)
    keys = ("recipe.epochs=3", "recipe.schedule.warmup_epochs=1", "trainer.log_every_n_steps=1")
    outcome = cli.train(*keys, "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    cfg = composed("model=swin", "recipe.batch_size=32", "trainer.limit_train_batches=5", *keys)
    epochs, settings = schedule_of(cfg, 39)
    assert list(settings) == ["learning rate"] and len(epochs) == 15 and epochs[-1] == pytest.approx(14 / 5)
    logged = [float(row["train/lr"]) for row in rows("run/metrics.csv") if row["train/lr"]]
    assert logged
    for value in logged:
        assert np.isclose(settings["learning rate"], value, rtol=1e-3).any(), value


def test_grey_images_become_colour_images_and_what_cannot_be_drawn_is_refused(tmp_path):
    assert to_pixels(torch.zeros(1, 2, 2), (0.5,), (0.25,)).tolist() == np.full((2, 2, 3), 128).tolist()
    batch = {"index": torch.tensor([0, -1]), "image": torch.zeros(2, 3, 2, 2), "label": torch.tensor([1, 0])}
    data = composed(*DIGITS)
    module.resolve_preprocessing(data)
    assert [view.caption for view in views_of(batch, "val", build_data(data))] == ["1"]
    with pytest.raises(ValueError, match=r"browse\.py is for classification, .*, not task=panoptic"):
        browse.main(["data=coco_panoptic", "data.root=data", f"out={tmp_path}"])
