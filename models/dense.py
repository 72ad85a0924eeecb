"""Dense features: the stage maps of any net, for detection and segmentation heads."""

import inspect
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, to_2tuple
from torch import Tensor, nn
from torch.func import functional_call

from models.factory import build
from models.hierarchical import HierarchicalBackbone
from models.timm_nets import take_any_size
from models.weights import renamed
from retinue.utils.sizes import resolve, size_pixels

MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 192, 224, 256, 384, 448, 512)  # of pixels, tried in turn

# The norms of maps in the authors' dense checkpoints: norm0 to norm3, norm1 to norm4, outnorm0, extra_norms.0.
MAP_NORM = re.compile(r"(?:extra_norms\.|outnorm|norm)(\d)\.(weight|bias)")


def create_backbone(model_cfg: Mapping, data_cfg: Mapping, in_chans: int, min_stride: int = 4) -> "DenseBackbone":
    """The stage maps of the net of a `conf/model/*.yaml`, with the norms that its paper's dense code has.

    Raises:
        ValueError: the size, the name or an argument is unknown, or the net has no pyramid of maps.
    """
    name, args = resolve(model_cfg, size_pixels(data_cfg), dense=True)
    return DenseBackbone(name, **{"norms": None, "min_stride": min_stride, "in_chans": in_chans} | args)


class DenseBackbone(nn.Module):
    """Images (B, C, H, W) to a tuple of maps (B, channels[i], ⌈H / strides[i]⌉, ⌈W / strides[i]⌉), for any H and W.

    What no map needs is pruned or frozen, so each parameter to be trained has a gradient. For a net that takes only
    multiples of its window, images are zero-padded on the right and at the bottom, and the maps cropped.

    Args:
        name: of a net in timm's registry, where ours are too.
        out_indices: the maps to give, by the net's `feature_info`; by default the last of each stride, at most four.
        norms: put a LayerNorm on each map, as many papers' dense code does; None: where that of the net's paper does
            (`map_norms` of its class).
        min_stride: of the maps to give by default; none of a lower stride is among them.
        kwargs: arguments of the net; `img_size` is passed only to nets that have it.

    Raises:
        ValueError: the name, an argument or an index is unknown, or the net has no pyramid of maps. A forward pass
            raises one where the net takes images of one size only, and these have another.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        norms: bool | None = False,
        min_stride: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        self.net: Any = build_size_free(name, kwargs)
        info = list(self.net.feature_info)
        wanted = pyramid(name, [level["reduction"] for level in info], min_stride)
        wanted = wanted if out_indices is None else list(out_indices)
        norms = getattr(self.net, "map_norms", False) if norms is None else norms
        if not wanted or any(not -len(info) <= i < len(info) for i in wanted):
            raise ValueError(f"{name} has maps 0 to {len(info) - 1}, so out_indices cannot be {wanted}")
        self.levels = len(info)
        self.channels = [info[i]["num_chs"] for i in wanted]
        self.strides = [info[i]["reduction"] for i in wanted]
        whole = set(self.net.state_dict())
        self.indices = self.net.prune_intermediate_layers(wanted, prune_norm=True, prune_head=True)

        eps = next((module.eps for module in self.net.modules() if isinstance(module, nn.LayerNorm)), 1e-6)
        eps = getattr(self.net, "map_norm_eps", eps)
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=eps) for width in self.channels if norms)
        self.unused_weights = {f"net.{key}" for key in whole - set(self.net.state_dict())}  # of a classifier's weights
        self.optional_weights = {f"norms.{key}" for key in self.norms.state_dict()}

        self.multiple, self.only = 1, None
        if not isinstance(self.net, HierarchicalBackbone):
            in_chans, *own_size = self.net.pretrained_cfg["input_size"]
            self._probe(kwargs.get("in_chans", in_chans), to_2tuple(kwargs.get("img_size", own_size)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        H, W = x.shape[2:]
        if self.only not in (None, (H, W)):
            raise ValueError(f"{type(self.net).__name__} takes images of {self.only} pixels only, not {(H, W)}")
        x = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple))
        maps = self.net.forward_intermediates(
            x, indices=self.indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if x.shape[2:] != (H, W):
            maps = [m[..., : -(-H // s), : -(-W // s)] for m, s in zip(maps, self.strides, strict=True)]
        if self.norms:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return tuple(maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.net.set_grad_checkpointing(enable)

    def _probe(self, in_chans: int, own_size: Any) -> None:
        """Find on the meta device the images that the net takes, and freeze parameters that no map depends on."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        parameters = [weights[name].requires_grad_() for name, _ in self.named_parameters()]
        sizes = {multiple: (side := -(-96 // multiple) * multiple, side + multiple) for multiple in MULTIPLES}
        runs = []
        self.eval()
        for multiple, size in (*sizes.items(), (None, tuple(own_size))):
            images = torch.empty(1, in_chans, *size, device="meta")
            try:
                maps = functional_call(self, weights, (images,))
            except Exception:  # nets refuse sizes in every way
                continue
            exact = [m.shape[2:] for m in maps] == [torch.Size(-(-n // s) for n in size) for s in self.strides]
            runs.append((exact, multiple or 1, None if multiple else size, maps))
            if exact:
                break
        if not runs:
            raise ValueError(f"{type(self.net).__name__} gives no maps of images of {own_size} pixels")
        _, self.multiple, self.only, maps = max(runs, key=lambda run: run[0])  # the first, exact if any is
        self.train()
        grads = torch.autograd.grad([m.sum() for m in maps], parameters, allow_unused=True)
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.requires_grad_(grad is not None)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our own weights, the authors' dense ones or a classifier's under our names; for `load_weights`."""
        norms = {key: value for key, value in state.items() if key.startswith("norms.")}
        theirs = {key: match for key in state if (match := MAP_NORM.fullmatch(key))} if self.norms else {}
        numbers = {int(match[1]) for match in theirs.values()}
        start = 1 if numbers and 0 not in numbers and max(numbers) == self.levels else 0
        for key, match in theirs.items():
            if (index := int(match[1]) - start) in self.indices:
                norms[f"norms.{self.indices.index(index)}.{match[2]}"] = state[key]
        rest = {key.removeprefix("net."): value for key, value in state.items() if key not in {*norms, *theirs}}
        return norms | {f"net.{key}": value for key, value in renamed(self.net, rest).items()}


def build_size_free(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The net, with any image size allowed where the net has an argument for that."""
    with torch.device("meta"):
        takes = inspect.signature(type(build(name)).__init__).parameters
    if "img_size" not in takes:
        kwargs = {key: value for key, value in kwargs.items() if key != "img_size"}
    free = {"dynamic_img_size": True, "strict_img_size": False}
    option: dict[str, Any] = next(({key: value} for key, value in free.items() if key in takes), {})
    net = build(name, **option | kwargs)
    take_any_size(net)
    return net


def pyramid(name: str, strides: Sequence[int], min_stride: int = 1) -> list[int]:
    """The last map of each stride from `min_stride` on, at most four."""
    last = [i for i, stride in enumerate(strides) if stride not in strides[i + 1 :]]
    if any(strides[j] % strides[i] for i, j in pairwise(last)):
        raise ValueError(f"{name} has no pyramid of maps: its strides are {sorted(set(strides))}")
    return [i for i in last if strides[i] >= min_stride][-4:]
