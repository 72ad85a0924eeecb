"""Search of the best architecture of a trained supernet: evolution, judged by images that the training never saw.

As in ViT-ResNAS (Liao, Karaman and Sze, 2021, arXiv:2109.00642). Written after the paper and what the authors'
repository, yilunliao/vit-search, computes; none of its code is here.
"""

import csv
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from models import load_weights
from models.factory import build
from models.supernets.vit_resnas_space import Architecture, Cost, expressed, from_json, layouts, subnet_state, to_json
from retinue.results.evolution import Evolution, draw_new
from retinue.runs.checkpoints import LAST
from retinue.runs.result_file import RESULT, read_config
from retinue.runs.training import build_data, build_task
from retinue.utils.command_line import to_text
from retinue.utils.files import replacing, write_text

# Files of a search's folder: its options, every candidate with its figures, and the best one.
OPTIONS, CANDIDATES, BEST = "options.yaml", "candidates.csv", "best.yaml"
COLUMNS = ("generation", "top1", "loss", "macs", "params", "architecture")


class Candidate(NamedTuple):
    """An architecture with its figures on the held-out images.

    Attributes:
        generation: Generation that it was drawn in, from 0.
        top1: Share of the images that are classified correctly.
        loss: Mean cross-entropy.
        macs: Multiply-accumulates for one image.
        params: Number of parameters.
        architecture: The architecture.
    """

    generation: int
    top1: float
    loss: float
    macs: int
    params: int
    architecture: Architecture


class SupernetRun:
    """A finished run of task=supernet, whose architectures are judged with the weights that they share.

    Args:
        folder: Folder of the run.
        device: Device that judges.

    Raises:
        ValueError: There is no such run, it is not finished, or it is of another task.
    """

    def __init__(self, folder: Path, device: torch.device):
        cfg = read_config(folder)
        if cfg is None:
            raise ValueError(f"run={folder} is no run folder: it has no config.yaml")
        if cfg.task.name != "supernet":
            raise ValueError(f"run={folder} must be a run of task=supernet, not task={cfg.task.name}")
        if not (folder / RESULT).exists():
            raise ValueError(f"run={folder} is not finished: start its command again")
        self.cfg, self.device = cfg, device
        cfg.recipe.batch_size = cfg.task.eval_batch * cfg.trainer.devices * cfg.trainer.num_nodes
        cfg.trainer.accumulate_grad_batches = 1
        self.datamodule = build_data(cfg)
        net: Any = build_task(cfg, self.datamodule).model
        load_weights(net, str(folder / "checkpoints" / LAST))
        self.space = net.space
        self.state = {name: value.to(device) for name, value in net.state_dict().items()}
        size = self.datamodule.image_size
        image = (size, size) if isinstance(size, int) else size
        self.cost = Cost(image, self.datamodule.in_chans, self.datamodule.num_classes, net.stem, net.extra)

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        """Return the arguments of `ViTResNAS` that build the architecture's net."""
        return {"layouts": layouts(self.space, architecture), "stem": self.cost.stem}

    def macs(self, architecture: Architecture) -> int:
        """Return the multiply-accumulates of an architecture's net for one image."""
        return self.cost.macs(self.space, architecture)

    def net(self, architecture: Architecture) -> nn.Module:
        """Return the architecture's net with the weights that it shares, for evaluation."""
        with torch.device("meta"):
            net = build(
                "vit_resnas_tiny", self.cost.image_size, num_classes=self.cost.num_classes, in_chans=self.cost.in_chans,
                **self.arguments(architecture),
            )  # fmt: skip
        net.load_state_dict(subnet_state(self.state, self.space, architecture), assign=True)
        return net.eval()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, H, W) and labels (B,) of the held-out part of the training split."""
        for batch in self.datamodule.val_dataloader():
            tensors = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
            batch = self.datamodule.on_after_batch_transfer(tensors, 0)
            yield batch["image"], batch["label"]

    @torch.inference_mode()
    def judge(self, architecture: Architecture, generation: int) -> Candidate:
        """Return the architecture's figures on the held-out images."""
        net = self.net(architecture)
        right, loss, images = 0, 0.0, 0
        for image, label in self.batches():
            scores = net(image).float()
            right += int((scores.argmax(1) == label).sum())
            loss += float(F.cross_entropy(scores, label, reduction="sum"))
            images += len(label)
        params = sum(parameter.numel() for parameter in net.parameters())
        return Candidate(generation, right / images, loss / images, self.macs(architecture), params, architecture)


class ArchitectureSearch:
    """A search in a folder, which every start with the same options resumes.

    Each generation is drawn from (seed, number of the generation) and the candidates before it, so a resumed search
    draws what was drawn before, and takes the figures that candidates.csv has.

    Args:
        run: Run of the supernet.
        folder: Folder of the search.
        evolution: Draws architectures within the budget.
        generations: Number of generations; the first is random.
        population: Number of random architectures.
        parents: Number of the best architectures that the next generation descends from.
        children: Number of mutations, and of crossovers, in a generation.
        seed: Seed of the search.

    Raises:
        ValueError: The folder holds a search with other options, or candidates.csv is damaged.
    """

    def __init__(
        self,
        run: SupernetRun,
        folder: Path,
        evolution: Evolution,
        *,
        generations: int,
        population: int,
        parents: int,
        children: int,
        seed: int,
    ):
        self.run, self.folder, self.evolution = run, folder, evolution
        self.generations, self.population, self.parents, self.children = generations, population, parents, children
        self.seed = seed
        # More generations extend a search.
        options = {
            "budget_macs": evolution.budget, "mutation_rate": evolution.mutation_rate, "population": population,
            "parents": parents, "children": children, "seed": seed,
        }  # fmt: skip
        if (folder / OPTIONS).exists():
            saved = yaml.safe_load((folder / OPTIONS).read_text(encoding="utf-8"))
            for key, value in options.items():
                if not isinstance(saved, dict) or saved.get(key) != value:
                    given = saved.get(key) if isinstance(saved, dict) else saved
                    raise ValueError(f"{folder} holds a search with {key}={given}, not {value}: choose another folder")
        self.known = {expressed(candidate.architecture): candidate for candidate in read_candidates(folder)}
        write_text(folder / OPTIONS, yaml.safe_dump(options, sort_keys=False))
        write_candidates(folder, list(self.known.values()))

    def go(self) -> Iterator[list[Candidate]]:
        """Run the search; yield all candidates, the best first, after each generation."""
        ranked: list[Candidate] = []
        for generation in range(self.generations):
            rng = np.random.default_rng([self.seed, generation])
            if generation == 0:
                drawn = draw_new(lambda: self.evolution.random(rng), self.population, [])  # noqa: B023
            else:
                architectures = [candidate.architecture for candidate in ranked]
                drawn = self.evolution.next_generation(architectures, self.children, self.parents, rng)
            ranked += [self._judge(architecture, generation) for architecture in drawn]
            # Few held-out images leave many ties, which the loss breaks.
            ranked.sort(key=lambda candidate: (-candidate.top1, candidate.loss))
            self._write_best(ranked[0])
            yield ranked

    def _judge(self, architecture: Architecture, generation: int) -> Candidate:
        key = expressed(architecture)
        if key not in self.known:
            candidate = self.known[key] = self.run.judge(architecture, generation)
            with (self.folder / CANDIDATES).open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(_to_row(candidate))
        # The sizes of blocks that are left out are those of this draw: a resumed search draws the same again.
        return self.known[key]._replace(generation=generation, architecture=architecture)

    def _write_best(self, best: Candidate) -> None:
        arguments = self.run.arguments(best.architecture)
        content = {
            "top1": best.top1, "macs": best.macs, "params": best.params,
            "layouts": [[layout.dim, layout.head_dim, list(layout.heads), list(layout.hidden)]
                        for layout in arguments["layouts"]],
            "stem": arguments["stem"],
        }  # fmt: skip
        write_text(self.folder / BEST, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=1000))

    @cached_property
    def data_overrides(self) -> list[str]:
        """Overrides of train.py that choose the data of the supernet's run."""
        data = self.run.cfg.data
        root = data.get("root")
        return [f"data={data.name}", *([f"data.root={root}"] if root else [])]

    def train_overrides(self, candidate: Candidate) -> list[str]:
        """Return the overrides of train.py that train a candidate's net from scratch."""
        arguments = self.run.arguments(candidate.architecture)
        net = [f"+model.args.{key}={to_text(value)}" for key, value in arguments.items()]
        return ["model=vit_resnas", *net, *self.data_overrides]


def _to_row(candidate: Candidate) -> list[Any]:
    return [*candidate[:-1], to_json(candidate.architecture)]


def read_candidates(folder: Path) -> list[Candidate]:
    """Return the candidates of a search's folder, without a last line that a kill has cut short.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / CANDIDATES
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return [
            Candidate(
                int(row["generation"]), float(row["top1"]), float(row["loss"]), int(row["macs"]), int(row["params"]),
                from_json(row["architecture"]),
            )
            for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): remove its damaged lines, or choose another folder"
        ) from None


def write_candidates(folder: Path, candidates: list[Candidate]) -> None:
    """Write the candidates' file, whole or not at all."""
    with replacing(folder / CANDIDATES) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(map(_to_row, candidates))
