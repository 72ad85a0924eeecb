"""Plots depend on their data, and a failed plot leaves the previous file unchanged."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from retinue.evaluation.plots import plot_confusion, plot_curves, plot_reliability
from tests.retinue.evaluation.conftest import predict


def pixels(path) -> np.ndarray:
    """Read a plot, (H, W, 3), which must have a minimum size and number of colours."""
    image = np.asarray(Image.open(path).convert("RGB"))
    assert min(image.shape[:2]) > 300
    assert len(np.unique(image @ np.array([65536, 256, 1]))) > 10
    return image


@pytest.mark.parametrize("draw", [plot_reliability, lambda *a: plot_confusion(*a, class_names=list("abcdefghij"))])
def test_plots_depend_on_their_data(tmp_path, draw):
    pictures = {}
    for name, data in {"first": predict(500, 10), "same": predict(500, 10), "other": predict(500, 10, 1, 3.0)}.items():
        draw(tmp_path / f"{name}.png", data)
        pictures[name] = pixels(tmp_path / f"{name}.png")
    assert np.array_equal(pictures["first"], pictures["same"])
    assert not np.array_equal(pictures["first"], pictures["other"])


def test_the_confused_cell_is_dark(tmp_path):
    """Rows are true classes: with class 0 predicted as class 2, only the third cell of row 0 is dark."""
    p = predict(50, 3)
    p.label[:], p.topk[:, 0] = 0, 2
    plot_confusion(tmp_path / "c.png", p, ["left", "middle", "right"])
    image = pixels(tmp_path / "c.png")[:, : -image_margin(tmp_path / "c.png")].astype(int)
    # Pixels that are dark blue.
    rows, columns = np.nonzero((image[..., 2] - image[..., 0] > 60) & (image.sum(-1) < 300))
    height, width = image.shape[:2]
    assert rows.max() < 0.45 * height
    assert columns.min() > 0.55 * width


def image_margin(path) -> int:
    """Return the number of pixels at the right that the colour bar may take."""
    return Image.open(path).width // 4


def test_the_gap_between_confidence_and_accuracy_is_drawn(tmp_path):
    orange = {}
    for confidence in (0.5, 0.9):
        p = predict(100, 3)
        p.topk[:50, 0], p.topk[50:, 0], p.scores[:] = p.label[:50], p.label[50:] + 1, confidence
        plot_reliability(tmp_path / "r.png", p)
        image = pixels(tmp_path / "r.png").astype(int)
        upper = image[image.shape[0] // 10 : image.shape[0] // 2]
        orange[confidence] = ((upper[..., 0] > 190) & (upper[..., 2] < 60)).sum()
    # The edge of an empty bar is still a line.
    assert orange[0.9] > 20 * orange[0.5]


def test_many_classes_are_drawn_without_names(tmp_path):
    plot_confusion(tmp_path / "few.png", predict(400, 60), ["x" * 20] * 60)
    plot_confusion(tmp_path / "many.png", predict(400, 61), ["x" * 20] * 61)
    few, many = pixels(tmp_path / "few.png"), pixels(tmp_path / "many.png")
    assert first_column(few) > 1.5 * first_column(many)


def first_column(image: np.ndarray) -> int:
    """Return the column at which the matrix begins: the first one that is not mostly white background."""
    return int(np.argmax((image == 255).all(-1).mean(0) < 0.5))


def write_metrics(path, epochs: int, **columns) -> None:
    """Write sparse rows: figures of training twice per epoch, other figures at its end."""
    with open(path, "w", newline="") as file:
        names = [name.replace("_", "/", 1) for name in columns]
        writer = csv.DictWriter(file, ["step", "epoch", *names])
        writer.writeheader()
        for i in range(2 * epochs):
            row = {n: f((i + 1) / 2) for n, f in zip(names, columns.values(), strict=True) if i % 2 or "train" in n}
            writer.writerow({"step": 10 * (i + 1), "epoch": (i + 1) / 2, **row})


def test_curves_have_a_panel_for_each_quantity_of_any_name(tmp_path):
    loss = {"train_loss": lambda e: math.exp(-e), "val_loss": lambda e: 2 * math.exp(-e)}
    write_metrics(tmp_path / "one.csv", 5, **loss)
    write_metrics(tmp_path / "more.csv", 5, **loss, val_box_ap=lambda e: e / 6, train_lr=lambda e: 1e-3)
    write_metrics(tmp_path / "other.csv", 5, **loss, val_box_ap=lambda e: e / 8, train_lr=lambda e: 1e-3)
    shapes = {}
    for name in ("one", "more", "other"):
        plot_curves(tmp_path / f"{name}.png", tmp_path / f"{name}.csv")
        shapes[name] = pixels(tmp_path / f"{name}.png")
    assert shapes["more"].size > 2 * shapes["one"].size
    assert not np.array_equal(shapes["more"], shapes["other"])


def test_curves_without_epochs_go_by_step_and_without_rows_are_an_error(tmp_path):
    (tmp_path / "steps.csv").write_text("step,train/loss\n1,2.5\n2,\n3,1.5\n")
    plot_curves(tmp_path / "steps.png", tmp_path / "steps.csv")
    pixels(tmp_path / "steps.png")
    (tmp_path / "empty.csv").write_text("step,train/loss\n")
    with pytest.raises(ValueError, match=r"empty\.csv has no curves"):
        plot_curves(tmp_path / "steps.png", tmp_path / "empty.csv")


def test_a_failed_plot_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "r.png"
    path.write_text("before")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_reliability(path, predict(20, 3))
    assert path.read_text() == "before"


def test_evaluation_imports_neither_torch_nor_matplotlib():
    modules = ", ".join(f"retinue.evaluation.{name}" for name in ("classification", "plots", "predictions"))
    code = f"import sys, {modules}; "
    code += "sys.exit(' '.join({'torch', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
