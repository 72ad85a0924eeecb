"""Cache of features on the disk: one file for each net with its weights, preprocessing, data, split and kind.

A file's name is the SHA-256 of everything that its features follow from, so a change of any of these never finds an
older file. The code of the net is not part of it: remove the folder after changing a net.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from datamodules.images import ArrayImages, FileImages
from datamodules.webdataset import ShardImages
from models.weights import classifier_of
from retinue.probing.features import Features
from retinue.utils.files import replacing

log = logging.getLogger(__name__)

# A change of what `extract` computes is a new version, and then no older file is found.
VERSION = 1
NAMES = ("values", "label", "index")


def cached(folder: Path | None, facts: Mapping[str, Any], compute: Callable[[], Features]) -> tuple[Features, bool]:
    """Return the features that follow from `facts`: those in the cache, or else new ones, which the cache then keeps.

    A file that cannot be read is replaced, with a warning.

    Args:
        folder: Folder of the cache; None keeps nothing.
        facts: Everything that the features follow from, as values of JSON.
        compute: Function that computes them.

    Returns:
        The features, and whether they are from the cache.
    """
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    path = None if folder is None else folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if path is not None and path.exists():
        try:
            return load(path), True
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("%s cannot be read (%s): its features are computed anew", path, " ".join(str(error).split()))
    features = compute()
    if path is not None:
        with replacing(path) as temporary:
            tensors = {name: getattr(features, name).contiguous() for name in NAMES}
            save_file(tensors, temporary, metadata={"facts": text})
    return features, False


def load(path: Path) -> Features:
    """Return the features of a file.

    Raises:
        SafetensorError: The file is no whole safetensors file.
        ValueError: It holds other tensors than features.
    """
    with safe_open(path, "pt") as file:
        features = Features(*(file.get_tensor(name) for name in NAMES))
    if not len(features.values) == len(features.label) == len(features.index):
        raise ValueError("its tensors have different lengths")
    return features


def weights_digest(net: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and values of a net's parameters and buffers.

    The classifier is left out: no feature depends on it, and that of other classes may be drawn at random.
    """
    digest = hashlib.sha256()
    state = net.state_dict()
    for name in sorted(state.keys() - classifier_of(net, state)):
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def images_digest(images: Any) -> str:
    """Return the SHA-256 of the names and labels of a split's images, and of what tells their content.

    The content is that of images in memory, and of files the size and the time of their last change.
    """
    digest = hashlib.sha256(np.asarray(images.labels).tobytes())
    for position in range(len(images)):
        digest.update(images.name(position).encode(errors="surrogateescape") + b"\0")
    if isinstance(images, ArrayImages):
        digest.update(images.images.tobytes())
    files: list[Path] = []
    if isinstance(images, FileImages):
        files = [Path(images.root, images.name(position)) for position in range(len(images))]
    elif isinstance(images, ShardImages):
        files = [Path(shard) for shard in images.shards]
    for file in files:
        # An unreadable file is a broken image, which the features leave out.
        facts = file.stat() if file.exists() else None
        digest.update(f"{facts and (facts.st_size, facts.st_mtime_ns)}".encode())
    return digest.hexdigest()
