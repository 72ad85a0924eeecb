"""Weights into nets: released checkpoints and our own, whatever their names, and a guard against misfits."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_levit, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from models.timm_nets import RENAMES, Renames
from models.unpickling import read_weights

WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema")  # under which checkpoints hold the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # of DDP, torch.compile, a LightningModule, a detector


class Loaded(NamedTuple):
    """What `load_weights` did, by names."""

    loaded: list[str]
    missing: list[str]  # of the model; left as they were
    unexpected: list[str]  # of the file; not used
    resized: list[str]  # position tables that were interpolated
    dropped: list[str]  # of the file; left out on purpose: a classifier, pruned parts, what is not of the backbone

    def __str__(self) -> str:
        rest = (f"{len(names)} {field}" for field, names in zip(self._fields[1:], self[1:], strict=True) if names)
        return ", ".join((f"{len(self.loaded)} weights loaded", *rest))


def load_weights(
    model: nn.Module, path_or_state: str | Path | Mapping, strict: bool = True, drop_classifier: bool = False
) -> Loaded:
    """Load a checkpoint: the authors', timm's or our own.

    Nothing in a file is executed. Weights are looked for under `state_dict_ema`, `state_dict` and `model`, lose the
    prefixes that wrappers add, and are renamed by `model.checkpoint_filter`, or timm's for timm's nets. Position
    tables are interpolated to the model's size; a module may have `resize_table(name, value)` for those of its own.
    A model may declare `optional_weights`, names that may be missing, and `unused_weights`, names of the file that it
    has no use for.

    Args:
        path_or_state: a safetensors or torch file, or what one holds.
        strict: False loads the weights that fit and reports the others.
        drop_classifier: leave out a classifier of another width.

    Raises:
        ValueError: the file cannot be read, or a weight is missing, unexpected or of another shape.
    """
    source = "the state dict" if isinstance(path_or_state, Mapping) else str(path_or_state)
    content = path_or_state if isinstance(path_or_state, Mapping) else read_weights(path_or_state)
    own = model.state_dict()
    theirs, dropped = unwrap(content, own)
    if not theirs:
        raise ValueError(f"{source} holds no tensors by name, as a state dict does")
    ours = renamed(model, theirs)
    state = {key: resized(model, key, value, own) for key, value in ours.items()}
    tables = [key for key in state if state[key].shape != theirs.get(key, ours[key]).shape]

    misshapen = {key for key in state if key in own and state[key].shape != own[key].shape}
    classifier = classifier_of(model, {**state, **own})
    unused = {key for key in getattr(model, "unused_weights", ()) if key not in own}
    unused |= classifier & misshapen if drop_classifier else set()
    optional = {*getattr(model, "optional_weights", ()), *(classifier if drop_classifier else ())}
    dropped += [key for key in state if key in unused]
    unexpected = [key for key in state if key not in own and key not in unused]
    missing = [key for key in own if key not in state or key in misshapen]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # no checkpoint need count batches

    wanting = {key for key in missing if key not in optional}
    fits = {key: value for key, value in state.items() if key in own and key not in misshapen}
    if not fits or (strict and (wanting or unexpected)):
        shapes = [f"{key} {_shape(state[key])} for {_shape(own[key])}" for key in own if key in misshapen & wanting]
        problems = {"missing": sorted(wanting - misshapen), "unexpected": unexpected, "of another shape": shapes}
        if not fits:
            advice = "these are weights of another model"
        elif {*wanting, *unexpected} <= classifier:
            advice = "they have another classifier: leave it out with drop_classifier=True"
        else:
            advice = "check the model's name, size and arguments"
        raise ValueError(f"{source} does not fit {type(model).__name__}: {_listed(problems)}; {advice}")
    model.load_state_dict(fits, strict=False)
    for module in model.modules():
        cache: Any = getattr(module, "attention_bias_cache", {})
        cache.clear()  # timm's nets keep their biases when they do not train
    return Loaded(list(fits), missing, unexpected, tables, dropped)


def unwrap(content: Mapping, own: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a checkpoint, without wrappers' prefixes, and the names of those that stand beside them."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
    beside = []
    prefixes = [prefix for prefix in PREFIXES if not any(key.startswith(prefix) for key in own)]
    while prefix := next((p for p in prefixes if any(key.startswith(p) for key in state)), None):
        beside += [key for key in state if not key.startswith(prefix)]
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state, beside


def renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the model's names."""
    own_filter: Any = getattr(model, "checkpoint_filter", None)
    if own_filter is not None:
        return own_filter(state)
    renames = RENAMES.get(type(model).__name__)
    filter_fn = timm_filter(model)
    if renames is not None:
        state = _rename_all(state, renames)
    elif filter_fn is not None:
        # such a function may fail in any way on another net's weights, whose names then tell more
        with contextlib.suppress(Exception):
            return filter_fn(dict(state), model)
    return rename_state(model, state)


def timm_filter(model: nn.Module) -> Callable | None:
    """The function with which timm renames the weights of one of its nets."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture", "")
    modules = [timm.models.model_entrypoint(name).__module__] if timm.is_model(name) else []
    found = (getattr(sys.modules[m], "checkpoint_filter_fn", None) for m in (*modules, type(model).__module__))
    return next(filter(None, found), None)


def rename_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply the `renames` of the model, then those of each of its modules to the names below it.

    A 1 x 1 convolution's weight becomes a linear layer's where the model has one there, and the other way round; a
    weight loses a first dimension of one that the model's lacks.
    """
    for prefix, module in model.named_modules():
        renames: Renames = getattr(module, "renames", ())
        if not renames:
            continue
        state = _rename_all(state, renames, f"{prefix}." if prefix else "")
    layers = {f"{prefix}.weight": module for prefix, module in model.named_modules()}
    ranks = {key: value.ndim for key, value in model.state_dict().items()}
    result = {}
    for key, value in state.items():
        if isinstance(layers.get(key), nn.Linear) and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        elif isinstance(layers.get(key), nn.Conv2d) and value.ndim == 2:
            value = value[:, :, None, None]
        elif value.shape[:1] == (1,) and value.ndim - 1 == ranks.get(key):
            value = value[0]
        result[key] = value
    return result


def _rename_all(state: dict[str, Tensor], renames: Renames, prefix: str = "") -> dict[str, Tensor]:
    """Apply `renames` to what follows `prefix` in the names that begin with it."""
    result = {}
    for key, value in state.items():
        if key.startswith(prefix):
            local = _rename(key.removeprefix(prefix), renames)
            if local is None:
                continue
            key = prefix + local
        result[key] = value
    return result


def _rename(key: str, renames: Renames) -> str | None:
    for pattern, name in renames:
        if name is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, name, key)
    return key


def resized(model: nn.Module, key: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """A table of positions interpolated to the model's window or grid; any other weight as it is."""
    if key not in own or value.shape == own[key].shape:
        return value
    owner, _, leaf = key.rpartition(".")
    module: Any = model.get_submodule(owner)
    if hasattr(module, "resize_table"):  # of a kind that only its owner knows
        return module.resize_table(leaf, value)
    shape, bias = own[key].shape, leaf == "relative_position_bias_table"
    heads = 0 if leaf == "attention_biases" or (bias and value.ndim == 3) else -1  # where the heads or channels are
    if value.ndim != len(shape) or value.shape[heads] != shape[heads]:
        return value
    if leaf == "attention_biases":
        return resize_rel_pos_bias_table_levit(value.T, shape[::-1]).T
    if bias:
        return resize_rel_pos_bias_table_simple(value, module.window_size, shape)
    if re.fullmatch(r"pos_embed(_\d)?", leaf) and value.ndim == 3 and hasattr(module, "patch_embed"):
        patches = module.patch_embed if leaf == "pos_embed" else module.patch_embed[int(leaf[-1])]  # CrossViT has two
        grid = [side // patch for side, patch in zip(patches.img_size, patches.patch_size, strict=True)]
        resample: Any = resample_abs_pos_embed  # its decorator hides its type
        return resample(value, grid, num_prefix_tokens=shape[1] - patches.num_patches)
    return value


def classifier_of(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the names that are of the model's classifier."""
    layers = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{layer}." for layer in ((layers,) if isinstance(layers, str) else layers))
    return {name for name in names if name.startswith(prefixes)}


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _listed(problems: Mapping[str, Sequence[str]], first: int = 3) -> str:
    """'2 missing (a, b), 9 unexpected (c, d, e, ...)'"""
    return ", ".join(
        f"{len(names)} {problem} ({', '.join(names[:first])}{', ...' if len(names) > first else ''})"
        for problem, names in problems.items()
        if names
    )
