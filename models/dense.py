"""Stage maps of any net, for detection and segmentation heads."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, to_2tuple
from torch import Tensor, nn
from torch.func import functional_call

from models.enhancers import ENHANCERS
from models.factory import build
from models.hierarchical import HierarchicalBackbone
from models.pyramid import STRIDES, SimplePyramid
from models.timm_nets import pad_to_whole_patches
from models.weights import rename_weights
from retinue.utils.arithmetic import ceil_div, padding, round_up
from retinue.utils.sizes import resolve, size_pixels
from retinue.utils.suggestions import nearest

# Multiples of pixels that a net's image sides may have to be, tried in this order.
MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 192, 224, 256, 384, 448, 512)

# Names of the maps' norms in the authors' detection and segmentation checkpoints: norm0 to norm3, norm1 to norm4,
# outnorm0 to outnorm3, extra_norms.0 to extra_norms.3, or norm0, norm2, norm4 and norm6.
MAP_NORM = re.compile(r"(?:extra_norms\.|outnorm|norm)(\d)\.(weight|bias|running_mean|running_var|num_batches_tracked)")


def create_backbone(
    model_cfg: Mapping, data_cfg: Mapping, in_chans: int, min_stride: int = 4, **changes: Any
) -> "DenseBackbone":
    """Create the backbone of a detector or segmentor from a `conf/model/*.yaml`.

    Its maps have norms if the detection and segmentation code of the net's paper has them. Maps of a plain net, which
    have one stride, become those of a simple feature pyramid.

    Args:
        model_cfg: A `conf/model/*.yaml`, as `models.factory.resolve` reads it.
        data_cfg: A `conf/data/*.yaml`, whose images choose the net's size if `model_cfg` names none.
        in_chans: Number of image channels.
        min_stride: Smallest stride of the maps, in pixels.
        changes: Arguments of `DenseBackbone` that the head changes; those of `model_cfg` win over them.

    Raises:
        ValueError: The size, the name or an argument is unknown, or the net has no pyramid of maps.
    """
    name, args = resolve(model_cfg, size_pixels(data_cfg), under_head=True)
    defaults = {"norms": None, "min_stride": min_stride, "in_chans": in_chans, "simple_pyramid": True}
    return DenseBackbone(name, **defaults | changes | args)


# Beginnings of the names of weights that `DenseBackbone` adds to a net's.
OWN = ("norms.", "pyramid.", "enhancer.")


class DenseBackbone(nn.Module):
    """Net that maps images to one feature map per stage, for images of any height and width.

    Images (B, C, H, W) become a tuple of maps (B, channels[i], ⌈H / strides[i]⌉, ⌈W / strides[i]⌉).

    Parts of the net that no map needs are removed, and parameters on which no map depends are frozen. So every
    parameter that requires a gradient gets one. Some nets take only image sides that are multiples of a window: the
    images are zero-padded on the right and at the bottom to such a multiple, and the maps are cropped.

    Args:
        name: Name of a net in timm's registry, which has our nets too.
        out_indices: Indices of the maps in the net's `feature_info`. By default the last map of each stride, at most
            four: those of the largest strides.
        norms: Apply a LayerNorm to each map, or the `map_norm` of the net's class. None does so if the detection and
            segmentation code of the net's paper does (`map_norms` of the net's class).
        min_stride: Smallest stride, in pixels, of the default maps.
        simple_pyramid: Make maps of strides 4, 8, 16 and 32 (`models.pyramid`) from the chosen maps if all of these
            have one stride, as those of a ViT do, and it is a power of 2. By default the last map is chosen; several
            blocks' maps, one for each stride, are chosen by `out_indices`, such as (2, 5, 8, 11). Other nets' maps stay
            as they are.
        enhancer: Name of an enhancer of images, a key of `models.enhancers.ENHANCERS`, which the images pass first.
        final_norm: Apply the net's final norm to the maps of a net whose maps all have one stride, as the linear
            evaluations of ViTs do.
        kwargs: Arguments of the net. `img_size` is passed on only to nets that have this argument.

    Attributes:
        channels: Number of channels of each map.
        strides: Stride in pixels of each map relative to the image.
        multiple: Number of pixels of which padded image sides are multiples; 1 if the net takes any size.
        only_size: The only (height, width) that the net takes, or None.

    Raises:
        ValueError: The name, an argument or an index is unknown, or the net has no pyramid of maps. A forward pass
            raises one if the net takes images of `only_size` and these have another size.

    Example:
        >>> backbone = DenseBackbone("swin_tiny", norms=True)
        >>> [m.shape for m in backbone(torch.zeros(1, 3, 250, 310))][0]
        torch.Size([1, 96, 63, 78])
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        norms: bool | None = False,
        min_stride: int = 1,
        simple_pyramid: bool = False,
        enhancer: str | None = None,
        final_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        if enhancer is not None and enhancer not in ENHANCERS:
            names = ", ".join(ENHANCERS)
            raise ValueError(f"enhancer {enhancer!r} is unknown.{nearest(enhancer, ENHANCERS)} There are: {names}")
        self.enhancer = None if enhancer is None else ENHANCERS[enhancer]()
        self.net: Any = build_for_any_size(name, kwargs)
        info = list(self.net.feature_info)
        strides = [level["reduction"] for level in info]
        one_stride = len(set(strides)) == 1
        self.final_norm = final_norm and one_stride
        has_pyramid = simple_pyramid and one_stride and math.log2(strides[0]).is_integer()
        default_indices = pyramid(name, strides, 1 if has_pyramid else min_stride)
        indices = default_indices if out_indices is None else list(out_indices)
        if not indices or any(not -len(info) <= i < len(info) for i in indices):
            raise ValueError(f"{name} has maps 0 to {len(info) - 1}, so out_indices cannot be {indices}")
        self.levels = len(info)
        self.channels = [info[i]["num_chs"] for i in indices]
        self.strides = [info[i]["reduction"] for i in indices]
        self.pyramid = None
        if has_pyramid:
            self.pyramid = SimplePyramid(self.channels[0], self.strides[0], len(indices), max(min_stride, STRIDES[0]))
            self.channels, self.strides = self.pyramid.channels, self.pyramid.strides
        names_before = set(self.net.state_dict()) | set(getattr(self.net, "unused_weights", ()))
        self.indices = self.net.prune_intermediate_layers(indices, prune_norm=not self.final_norm, prune_head=True)

        if norms is None:
            norms = getattr(self.net, "map_norms", False)
        eps = next((module.eps for module in self.net.modules() if isinstance(module, nn.LayerNorm)), 1e-6)
        eps = getattr(self.net, "map_norm_eps", eps)
        norm: Any = getattr(self.net, "map_norm", partial(LayerNorm2d, eps=eps))
        self.norms = nn.ModuleList([norm(width) for width in self.channels] if norms else [])
        # `load_weights` reads both: a classifier's checkpoint has weights of the removed parts, and no norms of maps.
        self.unused_weights = {f"net.{key}" for key in names_before - set(self.net.state_dict())}
        self.optional_weights = {key for key in self.state_dict() if key.startswith(OWN)}

        self.multiple, self.only_size = 1, None
        if not isinstance(self.net, HierarchicalBackbone):
            in_chans, *default_size = self.net.pretrained_cfg["input_size"]
            self._probe(kwargs.get("in_chans", in_chans), to_2tuple(kwargs.get("img_size", default_size)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        H, W = x.shape[2:]
        if self.only_size not in (None, (H, W)):
            raise ValueError(f"{type(self.net).__name__} takes images of {self.only_size} pixels only, not {(H, W)}")
        if self.enhancer is not None:
            x = self.enhancer(x)
        x = F.pad(x, (0, padding(W, self.multiple), 0, padding(H, self.multiple)))
        maps = self.net.forward_intermediates(
            x,
            indices=self.indices,
            norm=self.final_norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        if x.shape[2:] != (H, W) or self.pyramid is not None:
            maps = [m[..., : ceil_div(H, s), : ceil_div(W, s)] for m, s in zip(maps, self.strides, strict=True)]
        if self.norms:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return tuple(maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.net.set_grad_checkpointing(enable)

    def _probe(self, in_chans: int, default_size: Any) -> None:
        """Find the image sizes that the net takes, and freeze the parameters on which no map depends.

        The net runs on the meta device, for each of `MULTIPLES` and last for its default (height, width) alone. The
        first size whose maps have exactly the expected shapes counts, else the first one that runs at all.
        """
        tensors = [*self.named_parameters(), *self.named_buffers()]
        weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        parameters = [weights[name].requires_grad_() for name, _ in self.named_parameters()]
        # Two different sides, of at least 96 pixels, so that the maps' heights and widths differ.
        sizes = {multiple: (round_up(96, multiple), round_up(96, multiple) + multiple) for multiple in MULTIPLES}
        runs = []
        self.eval()
        for multiple, size in (*sizes.items(), (None, tuple(default_size))):
            images = torch.empty(1, in_chans, *size, device="meta")
            try:
                maps = functional_call(self, weights, (images,))
            except Exception:
                # Nets refuse an image size by exceptions of any kind.
                continue
            expected = [torch.Size(ceil_div(side, stride) for side in size) for stride in self.strides]
            exact = [m.shape[2:] for m in maps] == expected
            runs.append((exact, multiple or 1, None if multiple else size, maps))
            if exact:
                break
        if not runs:
            raise ValueError(f"{type(self.net).__name__} gives no maps of images of {default_size} pixels")
        # `max` returns the first of several equal runs.
        _, self.multiple, self.only_size, maps = max(runs, key=lambda run: run[0])
        self.train()
        grads = torch.autograd.grad([m.sum() for m in maps], parameters, allow_unused=True)
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.requires_grad_(grad is not None)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename weights to the names of this module; `load_weights` calls it.

        Args:
            state: Our own weights, those of the authors' detection or segmentation backbone, or a classifier's.
        """
        state = state if self.pyramid is None else self.pyramid.rename(state)
        norms = {key: value for key, value in state.items() if key.startswith(OWN)}
        authors_norms = {key: match for key in state if (match := MAP_NORM.fullmatch(key))} if self.norms else {}
        numbers = {int(match[1]) for match in authors_norms.values()}
        counts_from_1 = bool(numbers) and 0 not in numbers and max(numbers) == self.levels
        # Between two stages there is a number for the layer that downsamples.
        step = 2 if max(numbers, default=0) == 2 * self.levels - 2 > self.levels else 1
        for key, match in authors_norms.items():
            level = (int(match[1]) - int(counts_from_1)) // step
            if level in self.indices:
                norms[f"norms.{self.indices.index(level)}.{match[2]}"] = state[key]
        net = {
            key.removeprefix("net."): value
            for key, value in state.items()
            if key not in norms and key not in authors_norms
        }
        return norms | {f"net.{key}": value for key, value in rename_weights(self.net, net).items()}


def four_channels(backbone: DenseBackbone) -> list[int]:
    """Return the numbers of channels of the maps that `four_maps` returns for a backbone."""
    return backbone.channels + backbone.channels[-1:] * (4 - len(backbone.channels))


def four_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return a backbone's maps as four maps: the last one is subsampled by 2 for each missing map."""
    maps = [*maps]
    while len(maps) < 4:
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
    return maps


def build_for_any_size(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a net so that it takes images of any size, if it has an argument for this.

    Raises:
        ValueError: The name or an argument is unknown.
    """
    with torch.device("meta"):
        arguments = inspect.signature(type(build(name)).__init__).parameters
    if "img_size" not in arguments:
        kwargs = {key: value for key, value in kwargs.items() if key != "img_size"}
    if "dynamic_img_size" in arguments:
        kwargs = {"dynamic_img_size": True} | kwargs
    elif "strict_img_size" in arguments:
        kwargs = {"strict_img_size": False} | kwargs
    net = build(name, **kwargs)
    pad_to_whole_patches(net)
    return net


def pyramid(name: str, strides: Sequence[int], min_stride: int = 1) -> list[int]:
    """Return the indices of the last map of each stride, without strides below `min_stride`, the last four at most.

    Args:
        name: The net's name, for the error.
        strides: Stride of each of the net's maps.
        min_stride: Smallest stride of a map.

    Raises:
        ValueError: A stride is not a multiple of the previous one.
    """
    last = [i for i, stride in enumerate(strides) if stride not in strides[i + 1 :]]
    if any(strides[j] % strides[i] for i, j in pairwise(last)):
        raise ValueError(f"{name} has no pyramid of maps: its strides are {sorted(set(strides))}")
    return [i for i in last if strides[i] >= min_stride][-4:]
