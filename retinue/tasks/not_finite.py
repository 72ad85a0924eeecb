"""Write the training batch whose loss is not finite into the run's folder."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from safetensors.torch import save_file
from torch import Tensor

from datamodules.loader import private_rng

# Folder in the run's folder.
FOLDER = "not_finite"


def save_batch(trainer: pl.Trainer, batch_idx: int, step: int) -> Path:
    """Make a batch of the current epoch again and write it as `not_finite/rank<rank>.safetensors`.

    Training keeps no batch: a batch follows from the seed, the epoch, its number and the rank. The file holds `image`
    as the net received it, `index` (the positions of the images in the split) and the other tensors of the batch.
    Entries that are lists of tensors, such as `boxes`, have a number for each image: `boxes.0`, `boxes.1`, ... Its
    metadata are `epoch`, `batch`, `step` and `names`, the images' names as JSON.

    Args:
        trainer: The trainer, during training.
        batch_idx: Number of the batch in the epoch on this rank.
        step: Optimiser step of the batch.

    Returns:
        The path of the file.
    """
    datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    loader = datamodule.train_dataloader()
    loader.load_state_dict({"epoch": trainer.current_epoch, "batches": batch_idx})
    with private_rng(trainer.strategy.root_device):
        batch = trainer.strategy.batch_to_device(next(islice(loader, 1)))
    tensors: dict[str, Tensor] = {}
    for key, value in batch.items():
        entries = {f"{key}.{i}": entry for i, entry in enumerate(value)} if isinstance(value, list) else {key: value}
        tensors |= {name: entry.cpu().contiguous() for name, entry in entries.items() if isinstance(entry, Tensor)}
    names = [datamodule.images("train").name(index) for index in batch["index"].tolist()]
    facts = {"epoch": trainer.current_epoch, "batch": batch_idx, "step": step, "names": json.dumps(names)}
    path = Path(trainer.default_root_dir) / FOLDER / f"rank{trainer.global_rank}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {key: str(value) for key, value in facts.items()})
    return path
