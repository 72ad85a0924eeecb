"""Search of BossNAS (Li et al., ICCV 2021, arXiv:2103.12424): blocks are trained and their best paths chosen in turn.

Written after the paper and what the authors' repository, changlin31/BossNAS, computes; none of its code is here.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from datamodules.sampler import Plan
from models import load_weights
from models.supernets.hytra import HyTraSupernet
from models.supernets.hytra_space import to_text
from retinue.benchmarks.timing import Row, write_csv
from retinue.runs.checkpoints import LAST
from retinue.runs.config import check
from retinue.runs.training import build_data, build_task, train
from retinue.utils.paths import CONF

# (seed, epoch) of the two views that paths are rated by, the same for all.
VIEWS = (0, 0)


class BlockSearch:
    """A search in a folder: a run of task=bossnas for each block, and the ratings of the block's paths.

    The same search again goes on where it was stopped, since each block's run does.

    Args:
        folder: Folder of the search.
        overrides: Overrides of train.py that all runs share.
        device: Device that rates the paths.

    Raises:
        ValueError: The overrides make no valid run.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], device: torch.device):
        self.folder, self.overrides, self.device = folder, overrides, device
        cfg = self.config(0, [])
        # Check the run before anything is written.
        check(cfg)
        self.blocks = int((cfg.model.args or {}).get("blocks", 4))

    def config(self, block: int, chosen: Sequence[str]) -> DictConfig:
        """Return the config of a block's run: that of train.py, which starts from the weights of the block before."""
        own = [f"model.block={block}"]
        if block:
            weights = self.folder / f"block-{block - 1}" / "checkpoints" / LAST
            own += [f"model.chosen=[{','.join(chosen)}]", f"weights='{weights}'"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", ["task=bossnas", "model=hytra_supernet", *self.overrides, *own])
        cfg.run_dir = str(self.folder / f"block-{block}")
        return cfg

    def go(self) -> Iterator[str]:
        """Train the blocks in turn, and yield the path that is chosen for each."""
        chosen: list[str] = []
        for block in range(self.blocks):
            cfg = self.config(block, chosen)
            train(cfg)
            ratings = self.folder / f"ratings-{block}.csv"
            if not ratings.exists():
                write_csv(ratings, self.rate(cfg))
            with ratings.open(newline="", encoding="utf-8") as file:
                chosen.append(next(csv.DictReader(file))["path"])
            yield chosen[-1]

    @torch.inference_mode()
    def rate(self, cfg: DictConfig) -> list[Row]:
        """Return a row for each path of a block that is trained, with its distance from the ensemble, the best first.

        The images are those that the run held out of the training split, in two views of its augmentation.
        """
        datamodule = build_data(cfg)
        net: HyTraSupernet = build_task(cfg, datamodule).model
        load_weights(net, str(Path(cfg.run_dir) / "checkpoints" / LAST))
        net.to(self.device)
        total, images = torch.zeros(len(net.paths), dtype=torch.float64), 0
        for one, other in self.views(datamodule, cfg.task.eval_batch):
            total += net.rate(one, other, net.paths).double().sum(1).cpu()
            images += len(one)
        means = (total / images).tolist()
        rows: list[Row] = [
            {"path": to_text(path), "distance": mean} for path, mean in zip(net.paths, means, strict=True)
        ]
        return sorted(rows, key=lambda row: float(row["distance"]))  # pyright: ignore[reportArgumentType]

    def views(self, datamodule: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield two views (B, C, H, W) of the held-out images, by the augmentation of the training."""
        images, loader = datamodule.images("val"), datamodule.train_dataloader()
        fetch = type(loader.dataset)(images, datamodule.train_transform, datamodule.collate)
        # Batches of nearly equal size, since batch norms use the statistics of the batch.
        count = max(1, round(len(images) / batch_size))
        for part in torch.arange(len(images)).tensor_split(count):
            positions = part.repeat_interleave(2).tolist()
            batch = fetch[Plan(positions, [0, 1] * len(part), VIEWS, 0)]
            tensors = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
            pairs = datamodule.on_after_batch_transfer(tensors | {"seed": batch["seed"]}, 0)["image"]
            yield pairs[::2], pairs[1::2]
