"""Search space of ViT-ResNAS (Liao, Karaman and Sze, 2021, arXiv:2109.00642), and what an architecture of it costs.

Written after the paper and what the authors' repository, yilunliao/vit-search, computes; none of its code is here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from models.backbones.vit_resnas import PATCH, Layout
from models.layers.position import grid_of
from retinue.utils.arithmetic import ceil_div

# A removable block is kept (1) or left out (0) with these chances; growing spaces begin with the first entries.
KEEP = (1, 1, 0, 0)


class StageSpace(NamedTuple):
    """Choices of a stage, the largest first.

    Attributes:
        dims: Numbers of channels.
        head_dim: Channels of an attention head, which is not searched.
        heads: Numbers of attention heads of a block.
        hidden: Numbers of hidden channels of a block's MLP.
        removable: For each block whether it may be left out.
    """

    dims: tuple[int, ...]
    head_dim: int
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    removable: tuple[bool, ...]


class Genes(NamedTuple):
    """Choices made for a stage; the sizes of a block that is left out are kept for its return.

    Attributes:
        dim: Number of channels.
        heads: Number of attention heads of each block.
        hidden: Number of hidden channels of each block's MLP.
        kept: For each block whether it is in the net.
    """

    dim: int
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    kept: tuple[bool, ...]


Space = tuple[StageSpace, ...]
Architecture = tuple[Genes, ...]


def read_space(stages: Sequence[Mapping[str, Any]]) -> Space:
    """Return the space that a yaml describes, a mapping with the attributes of `StageSpace` for each stage.

    Raises:
        ValueError: A key is missing or unknown, a list is empty or has an entry below 1, or a stage can have fewer
            channels than the stage before, which the residual connection between stages does not allow.
    """
    space = []
    for i, stage in enumerate(stages):
        place = f"model.space: stage {i + 1}"
        if set(stage) != set(StageSpace._fields):
            raise ValueError(f"{place} must have the keys {', '.join(StageSpace._fields)}, not {', '.join(stage)}")
        choices = [tuple(sorted(stage[key], reverse=True)) for key in ("dims", "heads", "hidden")]
        if not all(choices) or min(map(min, choices)) < 1 or not stage["removable"]:
            raise ValueError(f"{place} needs at least one choice, 1 or more, in each list")
        dims, heads, hidden = choices
        space.append(StageSpace(dims, stage["head_dim"], heads, hidden, tuple(map(bool, stage["removable"]))))
    for i in range(1, len(space)):
        if space[i].dims[-1] < space[i - 1].dims[0]:
            raise ValueError(
                f"model.space: stage {i + 1} must have at least the {space[i - 1].dims[0]} channels that the stage "
                f"before can have, not {space[i].dims[-1]}"
            )
    return tuple(space)


def largest(space: Space) -> Architecture:
    """Return the architecture with the largest choices and all blocks."""
    return tuple(
        Genes(
            stage.dims[0],
            (stage.heads[0],) * len(stage.removable),
            (stage.hidden[0],) * len(stage.removable),
            (True,) * len(stage.removable),
        )
        for stage in space
    )


def smallest(space: Space) -> Architecture:
    """Return the architecture with the smallest choices and no removable block."""
    return tuple(
        Genes(
            stage.dims[-1],
            (stage.heads[-1],) * len(stage.removable),
            (stage.hidden[-1],) * len(stage.removable),
            tuple(not removable for removable in stage.removable),
        )
        for stage in space
    )


def layouts(space: Space, architecture: Architecture) -> list[Layout]:
    """Return an architecture as the argument `layouts` of `ViTResNAS`."""
    return [
        Layout(
            genes.dim,
            stage.head_dim,
            tuple(heads for heads, kept in zip(genes.heads, genes.kept, strict=True) if kept),
            tuple(hidden for hidden, kept in zip(genes.hidden, genes.kept, strict=True) if kept),
        )
        for stage, genes in zip(space, architecture, strict=True)
    ]


def expressed(architecture: Architecture) -> Architecture:
    """Return the architecture with sizes of 0 for the blocks that are left out: equal nets have equal results."""
    return tuple(
        genes._replace(
            heads=tuple(heads * kept for heads, kept in zip(genes.heads, genes.kept, strict=True)),
            hidden=tuple(hidden * kept for hidden, kept in zip(genes.hidden, genes.kept, strict=True)),
        )
        for genes in architecture
    )


def to_json(architecture: Architecture) -> str:
    """Return an architecture as one line of JSON."""
    return json.dumps([[g.dim, g.heads, g.hidden, list(map(int, g.kept))] for g in architecture], separators=(",", ":"))


def from_json(text: str) -> Architecture:
    """Return the architecture that `to_json` wrote."""
    return tuple(
        Genes(dim, tuple(heads), tuple(hidden), tuple(map(bool, kept))) for dim, heads, hidden, kept in json.loads(text)
    )


def subnet_state(state: Mapping[str, Tensor], space: Space, architecture: Architecture) -> dict[str, Tensor]:
    """Return the weights of an architecture's net, views of the supernet's: the first channels, heads and so on.

    Args:
        state: State dict of the supernet.
        space: Space of the supernet.
        architecture: Architecture of the space.
    """
    last = len(space) - 1
    weights = {}
    for name, value in state.items():
        parts = name.split(".")
        i = int(parts[1]) if parts[0] == "stages" else last
        dim, genes = architecture[i].dim, architecture[i]
        if "blocks" in parts:
            j = int(parts[3])
            if not genes.kept[j]:
                continue
            parts[3] = str(sum(genes.kept[:j]))
            kind, inner = parts[-2], genes.heads[j] * space[i].head_dim
            if kind == "qkv":
                # Rows are queries, keys and values of all heads.
                value = value.unflatten(0, (3, -1))[:, :inner].flatten(0, 1)
                value = value[:, :dim] if parts[-1] == "weight" else value
            elif parts[-1] == "weight" and kind in ("proj", "fc2"):
                value = value[:dim, : inner if kind == "proj" else genes.hidden[j]]
            elif kind == "fc1":
                value = value[: genes.hidden[j], :dim] if parts[-1] == "weight" else value[: genes.hidden[j]]
            else:
                value = value[:dim]
        elif parts[0] == "head":
            value = value[:, :dim] if parts[-1] == "weight" else value
        elif parts[0] == "norm" or "proj" in parts:
            value = value[:dim]
        elif parts[-1] in ("pos_embed", "cls_token"):
            value = value[..., :dim]
        elif i and parts[3] == "norm":
            value = value[: architecture[i - 1].dim]
        elif i:
            # Convolution of the map and transform of the class token
            value = value[:dim, : architecture[i - 1].dim] if parts[-1] == "weight" else value[:dim]
        weights[".".join(parts)] = value
    return weights


class Cost(NamedTuple):
    """Count of multiply-accumulates of the architectures of a space.

    Attributes:
        image_size: (height, width) of the images in pixels.
        in_chans: Number of image channels.
        num_classes: Number of classes.
        stem: Channels of the convolutions before the patches; 0 for none.
        extra: Number of class tokens, 0 or 1.
    """

    image_size: tuple[int, int]
    in_chans: int
    num_classes: int
    stem: int
    extra: int

    def macs(self, space: Space, architecture: Architecture) -> int:
        """Return the multiply-accumulates for one image, as `models.complexity` counts them on the built net."""
        rows, columns = grid_of(self.image_size, PATCH)
        dim = architecture[0].dim
        if self.stem:
            # Images are padded to whole patches, and the first convolution halves the sides.
            places = rows * columns * (PATCH // 2) ** 2
            total = 9 * places * self.stem * (self.in_chans + 2 * self.stem) + places * self.stem * dim
        else:
            total = rows * columns * PATCH**2 * self.in_chans * dim
        for i, genes in enumerate(architecture):
            if i:
                rows, columns = ceil_div(rows, 2), ceil_div(columns, 2)
                total += (9 * rows * columns + self.extra) * architecture[i - 1].dim * genes.dim
            tokens = self.extra + rows * columns
            for heads, hidden, kept in zip(genes.heads, genes.hidden, genes.kept, strict=True):
                if kept:
                    inner = heads * space[i].head_dim
                    total += tokens * (4 * genes.dim * inner + 2 * tokens * inner + 2 * genes.dim * hidden)
        return total + architecture[-1].dim * self.num_classes
