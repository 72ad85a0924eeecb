"""Features of images by a frozen net: which part of the net's output is read, and one pass over a split."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retinue.utils.arithmetic import ceil_div

# Kind of feature -> its meaning.
KINDS = {
    "head": "what the net's own classifier reads",
    "class_token": "the final class token",
    "mean": "the mean of the final map",
    "map": "the final map as tokens",
    "tokens": "the final map and the class and register tokens, as tokens",
}
# Largest number of tokens beside the map's by which we recognise them: a class token and registers.
MAX_EXTRA = 16


@dataclass(frozen=True)
class Features:
    """Features of the N readable images of a split, in their order.

    Attributes:
        values: float32 (N, D), or (N, T, D) for the kinds `map` and `tokens`.
        label: int64 (N,), class of each image.
        index: int64 (N,), position of each image in its split.
    """

    values: Tensor
    label: Tensor
    index: Tensor

    def take(self, rows: Tensor) -> "Features":
        """Return the features of some of the images."""
        return Features(self.values[rows], self.label[rows], self.index[rows])

    def to(self, device: torch.device) -> "Features":
        """Return the features on a device."""
        return Features(self.values.to(device), self.label.to(device), self.index.to(device))


def read(net: Any, images: Tensor, kind: str) -> Tensor:
    """Compute one kind of feature.

    Args:
        net: A classifier with timm's interface.
        images: (B, C, H, W), normalised.
        kind: A key of `KINDS`.

    Returns:
        (B, D), or (B, T, D) for the kinds `map` and `tokens`.

    Raises:
        ValueError: The net has no class token.
    """
    output = net.forward_features(images)
    if kind == "head":
        return net.forward_head(output, pre_logits=True)
    if output.ndim == 4:
        channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        tokens, extra = (output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)), 0
    else:
        tokens, extra = output, count_extra(net, output, images)
    if kind == "class_token":
        if not extra:
            raise ValueError(f"feature=class_token: {type(net).__name__} has no class token; feature=mean or head")
        return tokens[:, 0]
    places = tokens[:, extra:]
    return {"mean": places.mean(1), "map": places, "tokens": tokens}[kind]


def count_extra(net: Any, tokens: Tensor, images: Tensor) -> int:
    """Return how many of the final tokens (B, N, C) precede those of the map.

    Some nets add the class token after their last block only, so the size of the map decides. Nets that prune tokens
    have fewer tokens than places, and tell the number of the others by an attribute.
    """
    stride = net.feature_info[-1]["reduction"]
    extra = tokens.shape[1] - ceil_div(images.shape[2], stride) * ceil_div(images.shape[3], stride)
    if 0 <= extra <= MAX_EXTRA:
        return extra
    return getattr(net, "num_prefix_tokens", None) or getattr(net, "extra", 0)


@torch.no_grad()
def extract(
    net: nn.Module, datamodule: Any, split: str, kind: str, device: torch.device, dtype: torch.dtype
) -> Features:
    """Compute the features of a split, prepared as in evaluation and without augmentation, in one pass.

    Args:
        net: A classifier with timm's interface; it is moved to the device and put into evaluation mode.
        datamodule: A classification data module.
        split: train, val or test.
        kind: A key of `KINDS`.
        device: Device that computes.
        dtype: float32, or the type of autocast.

    Raises:
        ValueError: The net lacks what the kind needs, the features do not fit into this machine's memory, they are not
            finite, or too many images cannot be read.
    """
    net.to(device).eval()
    parts: list[Features] = []
    total = len(datamodule.images(split))
    for batch in datamodule.ordered_dataloader(split):
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        batch = datamodule.on_after_batch_transfer(batch, 0)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            values = read(net, batch["image"], kind)
        if not parts:
            check_memory(values[0], total, kind)
        rows = batch["index"] >= 0
        parts.append(Features(values[rows].float().cpu(), batch["label"][rows].cpu(), batch["index"][rows].cpu()))
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "label", "index"))
    features = Features(*joined)
    finite = features.values.flatten(1).isfinite().all(1)
    if not finite.all():
        raise ValueError(f"the features of {int((~finite).sum())} of {len(finite)} images of {split} are not finite")
    return features


def check_memory(example: Tensor, images: int, kind: str) -> None:
    """Refuse features that would not fit into this machine's memory.

    Args:
        example: Features of one image.
        images: Number of images.
        kind: Kind of the features.

    Raises:
        ValueError: They would take more than half of the memory.
    """
    needed, memory = 4 * example.numel() * images, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * needed > memory:
        raise ValueError(
            f"feature={kind} of {images:,} images takes {needed / 2**30:.0f} GiB, more than half of this machine's "
            f"{memory / 2**30:.0f} GiB of memory; feature=head takes one vector an image"
        )
