"""Supernet of BossNAS in the space HyTra, one block of which is trained at a time by ensemble bootstrapping.

BossNAS: Li et al., ICCV 2021, arXiv:2103.12424. Written after the paper and what the authors' repository,
changlin31/BossNAS, computes. It names no licence, so none of its code is here.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.hierarchical import imagenet_cfg
from models.supernets.hytra_blocks import CandidateBlock, Projector, mlp
from models.supernets.hytra_space import STAGES, Path, from_text, paths, to_text


class Branch(nn.Module):
    """Stem, candidates of all layers by block, layer and choice, and a projector for each block."""

    def __init__(self, blocks: int, layers: int, dim: int, stem_stride: int, in_chans: int, hidden: int, out: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 64, 7, stem_stride, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.blocks = nn.ModuleList()
        for block in range(blocks):
            modules = []
            for layer in range(layers):
                depth = block * layers + layer
                choices = {path[-1] for path in paths(0, min(depth + 1, STAGES))}
                stem = None if depth else 64
                modules.append(
                    nn.ModuleDict({str(choice): CandidateBlock(choice, dim, stem) for choice in sorted(choices)})
                )
            self.blocks.append(nn.ModuleList(modules))
        dims = [4 * dim * 2**stage for stage in range(STAGES)]
        self.projectors = nn.ModuleList(Projector(dims, hidden, out) for _ in range(blocks))

    def run(self, x: Tensor, block: int, path: Path, start: int) -> Tensor:
        """Run a block along a path on a map of the stage `start`."""
        layers: Any = self.blocks[block]
        for layer, choice in zip(layers, path, strict=True):
            x = layer[str(choice)](x, choice.stage > start)
            start = choice.stage
        return x


class HyTraSupernet(nn.Module):
    """Siamese supernets, of which one block is trained: a path of the online branch predicts an ensemble of paths.

    The ensemble is the mean projection of several paths of the target branch, whose weights are a moving average of the
    online ones. Blocks before the trained one are fixed along their chosen paths. Batch norms always use the statistics
    of the batch, since those of a path differ from those of others.

    Args:
        block: Index of the block that is trained, from 0.
        chosen: Paths of the blocks before it, as `to_text` writes them.
        blocks: Number of blocks.
        layers: Number of layers of a block.
        dim: Channels inside the convolutional candidates of the first stage.
        stem_stride: Stride of the stem's convolution; the pooling after it doubles it.
        hidden: Hidden channels of the projectors and predictors.
        out: Channels of the projections.
        in_chans: Number of image channels.
        num_classes: Number of classes, kept for timm's interface: the training needs no labels.

    Raises:
        ValueError: `block` is no index of a block, or `chosen` does not fit the blocks before it.
    """

    def __init__(
        self,
        block: int = 0,
        chosen: Sequence[str] = (),
        blocks: int = 4,
        layers: int = 4,
        dim: int = 64,
        stem_stride: int = 2,
        hidden: int = 4096,
        out: int = 256,
        in_chans: int = 3,
        num_classes: int = 0,
    ):
        super().__init__()
        if not 0 <= block < blocks or len(chosen) != block:
            raise ValueError(
                f"model.args.block={block} must be below {blocks}, with a chosen path for each block before"
            )
        self.num_classes = num_classes
        self.block, self.chosen, self.start = block, tuple(map(from_text, chosen)), 0
        for path in self.chosen:
            if path not in paths(self.start, layers):
                raise ValueError(f"model.args.chosen: {to_text(path)} is no path from stage {self.start + 1}")
            self.start = path[-1].stage
        self.paths = paths(self.start, layers)
        self.online = Branch(blocks, layers, dim, stem_stride, in_chans, hidden, out)
        self.predictors = nn.ModuleList(mlp(out, hidden, out) for _ in range(blocks))
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.target = copy.deepcopy(self.online)
        self.requires_grad_(False)
        for module in (*self._trained(self.online), self.predictors[block]):
            module.requires_grad_(True)

    def _trained(self, branch: Branch) -> list[nn.Module]:
        """Return the parts of a branch that are trained."""
        stem = [] if self.block else [branch.stem]
        return [*stem, branch.blocks[self.block], branch.projectors[self.block]]

    def trained_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return the parameters that are trained with the target's moving averages of them."""
        sides = [
            [p for part in self._trained(branch) for p in part.parameters()] for branch in (self.online, self.target)
        ]
        return list(zip(*sides, strict=True))

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Return what the trained block reads: images (B, C, H, W), or for later blocks the map before the block."""
        if not self.block:
            return images
        x, start = self.target.stem(images), 0
        for block, path in enumerate(self.chosen):
            x = self.target.run(x, block, path, start)
            start = path[-1].stage
        return x

    def project(self, branch: Branch, x: Tensor, path: Path) -> Tensor:
        """Return projections (B, out) of what `read` returns, along a path of the trained block."""
        x = x if self.block else branch.stem(x)
        return branch.projectors[self.block](branch.run(x, self.block, path, self.start), path[-1].stage)

    def predict(self, x: Tensor, path: Path) -> Tensor:
        """Return the online predictions (B, out) of what `read` returns, along a path."""
        return self.predictors[self.block](self.project(self.online, x, path))

    def forward(self, images: Tensor) -> Tensor:
        """Return the predictions (B, out) along the first path."""
        return self.predict(self.read(images), self.paths[0])

    def loss(self, one: Sequence[Tensor], other: Sequence[Tensor], drawn: Sequence[Path]) -> Tensor:
        """Return the loss of ensemble bootstrapping, a scalar: the sum over the drawn paths.

        Args:
            one: For each drawn path, a view of the images, (B, C, H, W).
            other: For each drawn path, another view of the same images.
            drawn: The paths.
        """
        ones, others = ([self.read(view) for view in views] for views in (one, other))
        with torch.no_grad():
            targets = [
                torch.stack([F.normalize(self.project(self.target, x, path), dim=1)
                             for x, path in zip(views, drawn, strict=True)]).mean(0)
                for views in (ones, others)
            ]  # fmt: skip
        losses = [
            distance(self.predict(x, path), targets[1]) + distance(self.predict(y, path), targets[0])
            for x, y, path in zip(ones, others, drawn, strict=True)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def rate(self, one: Tensor, other: Tensor, rated: Sequence[Path]) -> Tensor:
        """Return how far each path is from the ensemble of all of them, (P, B): the lower, the better the path.

        Args:
            one: A view of the images, (B, C, H, W).
            other: Another view of the same images.
            rated: The P paths.
        """
        one, other = self.read(one), self.read(other)
        ensembles = [torch.stack([self.project(self.target, x, path) for path in rated]).mean(0) for x in (one, other)]
        return torch.stack(
            [
                distances(self.predict(one, path), ensembles[1]) + distances(self.predict(other, path), ensembles[0])
                for path in rated
            ]
        )


def distances(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 2 - 2 cos of vectors (B, out), their squared distance after normalising, (B,)."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    return distances(prediction, target).mean()


default_cfgs = generate_default_cfgs({"hytra_supernet": imagenet_cfg(first_conv="online.stem.0", classifier=None)})


@register_model
def hytra_supernet(pretrained: bool = False, **kwargs) -> HyTraSupernet:
    """Return the supernet of BossNAS with one block to train; `conf/model/hytra_supernet.yaml` has its sizes."""
    return build_model_with_cfg(HyTraSupernet, "hytra_supernet", pretrained, **kwargs)
