"""Losses and medical figures of segmentation from the command line, on masks of 0 and 255."""

import numpy as np
import pytest
from PIL import Image

from tests.retinue.runs.cli import SWIN, result, rows


def test_a_run_with_losses_class_weights_and_medical_figures(cli, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "val": 3}.items():
        for i in range(count):
            mask = np.zeros((50, 70), np.uint8)
            mask[10 : 20 + i, 20:40] = 255
            image = (mask[..., None] // 2 + rng.integers(0, 100, (50, 70, 3))).astype(np.uint8)
            for kind, array in (("images", image), ("masks", mask)):
                path = tmp_path / f"data/{kind}/{split}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    outcome = cli(
        "train", *SWIN, "data=mask_folder", "data.root=data", "data.classes=[background,lesion]", "data.values=[0,255]",
        "task.figures=medical", "task.figure=dice", "task.spacing=[0.5,0.5]", "task.class_weights=[0.5,1]",
        "task.losses={cross_entropy: 1, dice: 1, boundary: {weight: 0.01}}", "data.num_workers=0", "logger=none",
        "trainer=cpu", "recipe.epochs=1", "recipe.batch_size=2", "recipe.augment.crop=[32,32]",
        "data.image_size=[50,70]", "recipe.optimizer.lr_batch_size=2", "hydra.run.dir=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    logged = rows(tmp_path / "run/metrics.csv")[-1]
    assert float(logged["train/decode.loss_dice"]) > 0 and float(logged["train/decode.loss_cross_entropy"]) > 0
    metrics = result(tmp_path / "run")["metrics"]
    lesion = metrics["test/per_class"]["lesion"]
    # The mean over the classes is that of the lesion, since the background is left out.
    assert metrics["test/dice"] == lesion["dice"] == pytest.approx(float(logged["val/dice"]), abs=1e-6)
    assert metrics["test/hd95_unit"] == "mm" and len(metrics["test/hd95_ci95"]) == 2
    outcome = cli("eval", "run=run", "trainer=cpu", "task.spacing=null", "hydra.run.dir=evaluation")
    assert outcome.code == 0, outcome.err
    pixels = result(tmp_path / "evaluation")["metrics"]
    assert (
        pixels["test/hd95"] == pytest.approx(2 * metrics["test/hd95"]) and pixels["test/dice"] == metrics["test/dice"]
    )
