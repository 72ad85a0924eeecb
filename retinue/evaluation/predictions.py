"""Tables of predictions with one row per image."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from retinue.evaluation.classification import Predictions
from retinue.utils.files import replacing, write_text


def write_predictions_csv(
    path: str | Path, predictions: Predictions, class_names: Sequence[str], image_names: Sequence[str]
) -> None:
    """Write predictions as a CSV table.

    The columns are image, label, prediction, correct (1 or 0), confidence, loss and top5 (names joined by " | ").

    Args:
        path: file to write.
        predictions: predictions without padding.
        class_names: name of each class, by label.
        image_names: name of each image, by position in the split.
    """
    names = list(class_names)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "prediction", "correct", "confidence", "loss", "top5"])
        for index, label, topk, scores, loss in zip(
            predictions.index, predictions.label, predictions.topk, predictions.scores, predictions.loss, strict=True
        ):
            top5 = [names[predicted] for predicted in topk[:5]]
            figures = int(topk[0] == label), f"{scores[0]:.6g}", f"{loss:.6g}"
            writer.writerow([image_names[index], names[label], top5[0], *figures, " | ".join(top5)])


def write_probabilities(
    stem: Path, predictions: Predictions, class_names: Sequence[str], image_names: Sequence[str]
) -> None:
    """Write the most probable classes of each image as `<stem>.csv` and `<stem>.json`.

    The CSV's columns are image, class1, probability1, class2, probability2, ... The JSON is a list of {"image": name,
    "classes": [{"name", "label", "probability"}, ...]}, from the most probable class downwards.

    Args:
        stem: path of the files without suffix.
        predictions: predictions without padding.
        class_names: name of each class, by label.
        image_names: name of each image, by position in the split.
    """
    rows = [
        {
            "image": image_names[index],
            "classes": [
                {"name": class_names[label], "label": label, "probability": float(f"{score:.6g}")}
                for label, score in zip(labels, scores, strict=True)
            ],
        }
        for index, labels, scores in zip(
            predictions.index, predictions.topk.tolist(), predictions.scores.tolist(), strict=True
        )
    ]
    write_text(stem.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    numbers = range(1, predictions.topk.shape[1] + 1)
    # A file system's names need not be UTF-8; `surrogateescape` writes their bytes as they are.
    with (
        replacing(stem.with_suffix(".csv")) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{column}{number}" for number in numbers for column in ("class", "probability"))])
        for row in rows:
            cells = ((entry["name"], f"{entry['probability']:.6g}") for entry in row["classes"])
            writer.writerow([row["image"], *(cell for pair in cells for cell in pair)])
