"""Small data set in COCO's panoptic layout: grey things on stuff, with void pixels and a crowd."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The stuff has the lowest id, so the labels are not in the order of the ids.
CATEGORIES = [
    {"id": 2, "name": "sky", "isthing": 0},
    {"id": 5, "name": "cat", "isthing": 1},
    {"id": 9, "name": "dog", "isthing": 1},
    {"id": 11, "name": "grass", "isthing": 0},
]
NAMES = ["cat", "dog", "sky", "grass"]


def write_panoptic(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write `root`/annotations/panoptic_{split}2017{.json,/*.png} and `root`/{split}2017/*.png.

    Each image has two regions of stuff, a row of void pixels, and two or three things, which may be crowds.

    Args:
        root: The folder.
        counts: Number of images of each split, by its name.
        seed: Seed of the images.
    """
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
        masks, images = root / f"annotations/panoptic_{split}2017", root / f"{split}2017"
        masks.mkdir(parents=True)
        images.mkdir(parents=True)
        for i in range(count):
            height, width = (60, 84) if i % 2 else (72, 50)
            ids = np.zeros((height, width), np.int64)
            categories = {}
            for category, rows in ((2, slice(2, 30)), (11, slice(30, None))):
                id = int(rng.integers(1, 2**24))
                ids[rows], categories[id] = id, category
            for _ in range(rng.integers(2, 4)):
                id, top, left = int(rng.integers(1, 2**24)), rng.integers(2, height - 20), rng.integers(0, width - 20)
                ids[top : top + rng.integers(8, 20), left : left + 18] = id
                categories[id] = int(rng.choice([5, 9]))
            segments = []
            for id, category in categories.items():
                rows, columns = np.nonzero(ids == id)
                if len(rows):
                    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                    crowd = int(category == 9 and id % 3 == 0)
                    segments.append({"id": id, "category_id": category, "iscrowd": crowd, "area": len(rows)})
                    segments[-1]["bbox"] = [int(side) for side in box]
            image = (np.stack([ids % 199, ids % 211, ids % 223], -1) + rng.integers(0, 20, (height, width, 1))).clip(
                0, 255
            )
            Image.fromarray(image.astype(np.uint8)).save(images / f"{i:03d}.png")
            colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1)
            Image.fromarray(colours.astype(np.uint8)).save(masks / f"{i:03d}.png")
            # The ids of the images are not in the order of the annotations.
            image_id = 100 - i
            content["images"].append({"id": image_id, "height": height, "width": width, "file_name": f"{i:03d}.png"})
            content["annotations"].insert(
                0, {"image_id": image_id, "file_name": f"{i:03d}.png", "segments_info": segments}
            )
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))
