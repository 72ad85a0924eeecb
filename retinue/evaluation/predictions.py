"""Table of predictions with one row per image."""

import csv
from collections.abc import Sequence
from pathlib import Path

from retinue.evaluation.classification import Predictions
from retinue.utils.files import replacing


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
