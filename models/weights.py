"""Load weights into nets: released checkpoints and our own, whatever names they use, with errors for those that misfit.

All loading goes through `load_weights`. Its steps are separate functions, in this order: `read_weights` (in
`models.unpickling`), `unwrap`, `rename_weights` and `fit_table`; then it compares names and shapes.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_levit, resize_rel_pos_bias_table_simple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from models.classifier_rows import ClassifierRows
from models.timm_nets import RENAMES, Renames
from models.unpickling import read_weights

# Keys under which checkpoints hold the weights, in order of preference.
WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_ema")
# Prefixes that DDP, torch.compile, a LightningModule and a detector put before the names of the weights.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


class Loaded(NamedTuple):
    """Report of `load_weights`: names of weights, by what was done with them. `str` counts them in one line.

    Attributes:
        loaded: Weights of the model that were loaded.
        missing: Weights of the model that were not loaded and keep their values.
        unexpected: Weights of the file that the model lacks.
        resized: Loaded weights that are position tables and were interpolated, or first convolutions that were fitted
            to another number of channels.
        dropped: Weights of the file that were left out on purpose: those of a classifier, of removed parts of the net,
            or outside the backbone.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    resized: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} weights loaded"]
        for field, names in zip(self._fields[1:], self[1:], strict=True):
            if names:
                counts.append(f"{len(names)} {field}")
        return ", ".join(counts)


def load_weights(
    model: nn.Module,
    path_or_state: str | Path | Mapping,
    strict: bool = True,
    drop_classifier: bool = False,
    classifier_rows: ClassifierRows | None = None,
) -> Loaded:
    """Load a checkpoint of the authors, of timm or of our own into a net.

    No code in the file is executed. The weights are looked for under `state_dict_ema`, `state_dict`, `model` and
    `model_ema`, lose the prefixes that wrappers add, and are renamed by `model.checkpoint_filter`, or by timm's filter
    for timm's nets. Position tables are interpolated to the model's window or grid, and the first convolution of a net
    for another number of channels is fitted, as timm does. Then every weight of the model must
    be in the file with its shape, and every weight of the file must be in the model.

    A model may take part in this by these methods and attributes, all optional:

    - `checkpoint_filter(state) -> state`: renames the weights of a file.
    - `renames` of the model or of a module inside: see `apply_renames`.
    - `resize_table(name, value) -> value` of a module: interpolates its position tables, in place of `fit_table`.
    - `own_prefixes`: prefixes in the authors' files that look like a wrapper's, such as `model.`.
    - `optional_weights`: names of the model's weights that the file may lack.
    - `optional` of a module inside: True if the file may lack the module's weights, which no filter renames.
    - `unused_weights`: names of weights of the file that the model does not need.

    Args:
        model: The net, which is changed in place.
        path_or_state: A safetensors or torch file, or the content of one.
        strict: Raise an error for weights that are missing, unexpected or of another shape. False loads the weights
            that fit and reports the others.
        drop_classifier: Leave out a classifier of another width, and accept a file without a classifier.
        classifier_rows: Rows of the file's classifier for the model's classes; None takes the classifier as it is.

    Returns:
        The names of the weights that were loaded, and of those that were not.

    Raises:
        ValueError: The file cannot be read, no weight fits, or with `strict` a weight is missing, unexpected or of
            another shape. The message lists the first of them and says what to do. Or the file's classifier does not
            have the rows of `classifier_rows`.

    Example:
        >>> net = timm.create_model("swin_tiny", num_classes=10)
        >>> print(load_weights(net, "swin_tiny_patch4_window7_224.pth", drop_classifier=True))
    """
    source = "the state dict" if isinstance(path_or_state, Mapping) else str(path_or_state)
    content = path_or_state if isinstance(path_or_state, Mapping) else read_weights(path_or_state)
    model_state = model.state_dict()
    file_state, dropped = unwrap(content, model_state, getattr(model, "own_prefixes", ()))
    if not file_state:
        raise ValueError(f"{source} holds no tensors by name, as a state dict does")
    renamed = rename_weights(model, file_state)
    grey = fit_first_convolutions(model, renamed, model_state)
    state = {key: fit_table(model, key, value, model_state) for key, value in grey.items()}
    tables = [key for key in state if state[key].shape != file_state.get(key, renamed[key]).shape]

    if classifier_rows is not None:
        state = classifier_rows.pick(state, model_state, classifier_of(model, model_state))
    misshapen = {key for key in state if key in model_state and state[key].shape != model_state[key].shape}
    classifier = classifier_of(model, {**state, **model_state})
    unused = {key for key in getattr(model, "unused_weights", ()) if key not in model_state}
    optional = {*getattr(model, "optional_weights", ()), *_weights_of_optional_modules(model)}
    if drop_classifier:
        unused |= classifier & misshapen
        optional |= classifier
    dropped += [key for key in state if key in unused]
    unexpected = [key for key in state if key not in model_state and key not in unused]
    missing = [key for key in model_state if key not in state or key in misshapen]
    # Counters of batch norms only matter for norms without momentum, and older checkpoints lack them.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]

    required = {key for key in missing if key not in optional}
    fits = {key: value for key, value in state.items() if key in model_state and key not in misshapen}
    if not fits or (strict and (required or unexpected)):
        shapes = [
            f"{key} {_format_shape(state[key])} for {_format_shape(model_state[key])}"
            for key in model_state
            if key in misshapen & required
        ]
        problems = {"missing": sorted(required - misshapen), "unexpected": unexpected, "of another shape": shapes}
        if not fits:
            advice = "these are weights of another model"
        elif {*required, *unexpected} <= classifier:
            advice = "they have another classifier: leave it out with drop_classifier=True"
        else:
            advice = "check the model's name, size and arguments"
        raise ValueError(f"{source} does not fit {type(model).__name__}: {_format_problems(problems)}; {advice}")
    model.load_state_dict(fits, strict=False)
    for module in model.modules():
        # Some of timm's nets cache biases in evaluation mode, computed from the weights that were just replaced.
        cache: Any = getattr(module, "attention_bias_cache", {})
        cache.clear()
    return Loaded(list(fits), missing, unexpected, tables, dropped)


def unwrap(
    content: Mapping, model_names: Iterable[str], own_prefixes: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights in a checkpoint without the prefixes of wrappers, and the names of tensors that lack them.

    A prefix is removed if one of the names has it and none of the model's names does. For example, of a detector's
    weights those under `backbone.` are the weights, and all others are returned as names.

    Args:
        content: Content of a weights file.
        model_names: Names of the model's weights.
        own_prefixes: Prefixes that are a wrapper's only if all names have them.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
    without_prefix = []
    prefixes = [prefix for prefix in PREFIXES if not any(key.startswith(prefix) for key in model_names)]
    while prefix := next((p for p in prefixes if _wraps(p, state, own_prefixes)), None):
        without_prefix += [key for key in state if not key.startswith(prefix)]
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state, without_prefix


def _wraps(prefix: str, names: Collection[str], own_prefixes: Collection[str]) -> bool:
    has_prefix = [name.startswith(prefix) for name in names]
    return any(has_prefix) and (all(has_prefix) or prefix not in own_prefixes)


def rename_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the model's names.

    A model with a `checkpoint_filter` renames them itself. For a net of timm's, our `RENAMES` come first, else timm's
    own filter. `apply_renames` follows after `RENAMES` and where there is neither. The weights of optional modules keep
    their names.
    """
    own = {key: state[key] for key in _weights_of_optional_modules(model) if key in state}
    return _rename_authors(model, {key: value for key, value in state.items() if key not in own}) | own


def _weights_of_optional_modules(model: nn.Module) -> Iterator[str]:
    """Yield the names of the weights of the modules whose attribute `optional` is True."""
    for prefix, module in model.named_modules():
        if getattr(module, "optional", False):
            yield from (f"{prefix}.{key}" for key in module.state_dict())


def _rename_authors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the model's names, as `rename_weights` does."""
    model_filter: Any = getattr(model, "checkpoint_filter", None)
    if model_filter is not None:
        return model_filter(state)
    renames = RENAMES.get(type(model).__name__)
    filter_fn = timm_filter(model)
    if renames is not None:
        state = rename_all(state, renames)
    elif filter_fn is not None:
        # timm's filters raise exceptions of any kind for another net's weights. Then keep the names as they are: the
        # error of `load_weights`, which lists them, explains more.
        with contextlib.suppress(Exception):
            return filter_fn(dict(state), model)
    return apply_renames(model, state)


def timm_filter(model: nn.Module) -> Callable | None:
    """Return the function by which timm renames the authors' weights of one of its nets, or None."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture", "")
    modules = [timm.models.model_entrypoint(name).__module__] if timm.is_model(name) else []
    for module in (*modules, type(model).__module__):
        filter_fn = getattr(sys.modules[module], "checkpoint_filter_fn", None)
        if filter_fn is not None:
            return filter_fn
    return None


def apply_renames(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply the `renames` of the model, then the `renames` of each module inside to the names below that module.

    A name of one of the model's own weights is kept, so that weights that we saved keep their names. Shapes that differ
    in form only are changed to the model's: the weight of a 1 x 1 convolution to that of a linear layer or vice versa,
    and a first dimension of 1 that the model's weight lacks is removed.
    """
    ranks = {key: value.ndim for key, value in model.state_dict().items()}
    for prefix, module in model.named_modules():
        renames: Renames = getattr(module, "renames", ())
        if not renames:
            continue
        state = rename_all(state, renames, f"{prefix}." if prefix else "", kept=ranks)
    layers = {f"{prefix}.weight": module for prefix, module in model.named_modules()}
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


def join_projections(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the weights of `q` and `kv`, or of `q`, `k` and `v`, where the model projects all three by `qkv`."""
    for key in model.state_dict():
        for names in (("q", "kv"), ("q", "k", "v")):
            parts = [key.replace(".qkv.", f".{name}.") for name in names]
            if ".qkv." in key and set(parts) <= set(state):
                state[key] = torch.cat([state.pop(part) for part in parts])
    return state


def rename_all(state: dict[str, Any], renames: Renames, prefix: str = "", kept: Collection[str] = ()) -> dict[str, Any]:
    """Apply `renames` to the names that begin with `prefix`, without changing the prefix; names in `kept` stay."""
    result = {}
    for key, value in state.items():
        if key.startswith(prefix) and key not in kept:
            new_name = _rename(key.removeprefix(prefix), renames)
            if new_name is None:
                continue
            key = prefix + new_name
        result[key] = value
    return result


def _rename(key: str, renames: Renames) -> str | None:
    """Apply all `renames` in order to one name; None if one of them drops the weight."""
    for pattern, replacement in renames:
        if replacement is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, replacement, key)
    return key


def fit_first_convolutions(
    model: nn.Module, state: dict[str, Tensor], model_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights with first convolutions for red, green and blue fitted to the model's number of channels.

    This is what timm does with its own weights (`adapt_input_conv`): for grey images the colours are summed, so that a
    grey image gives the same sums as an image of three equal channels; for other numbers of channels the colours are
    repeated in turn and scaled by 3 over that number.
    """
    layers = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    result = dict(state)
    for key in (f"{layer}.weight" for layer in ((layers,) if isinstance(layers, str) else layers)):
        if key not in state or key not in model_state or state[key].ndim != 4:
            continue
        channels = model_state[key].shape[1]
        if state[key].shape[1] == 3 != channels and state[key].shape[2:] == model_state[key].shape[2:]:
            result[key] = adapt_input_conv(channels, state[key])
    return result


def fit_table(model: nn.Module, key: str, value: Tensor, model_state: Mapping[str, Tensor]) -> Tensor:
    """Return a position table interpolated to the model's window or grid, and any other weight unchanged.

    Args:
        model: The net.
        key: Name of the weight in the model.
        value: The weight in the checkpoint.
        model_state: The model's weights, whose shapes count.
    """
    if key not in model_state or value.shape == model_state[key].shape:
        return value
    module_name, _, leaf = key.rpartition(".")
    module: Any = model.get_submodule(module_name)
    if hasattr(module, "resize_table"):
        return module.resize_table(leaf, value)
    shape, is_bias_table = model_state[key].shape, leaf == "relative_position_bias_table"
    # Dimension of the heads or channels, which interpolation does not change.
    dim = 0 if leaf == "attention_biases" or (is_bias_table and value.ndim == 3) else -1
    if value.ndim != len(shape) or value.shape[dim] != shape[dim]:
        return value
    if leaf == "attention_biases":
        return resize_rel_pos_bias_table_levit(value.T, shape[::-1]).T
    if is_bias_table:
        return resize_rel_pos_bias_table_simple(value, module.window_size, shape)
    if re.fullmatch(r"pos_embed(_\d)?", leaf) and value.ndim == 3 and hasattr(module, "patch_embed"):
        # CrossViT has two position tables, pos_embed_0 and pos_embed_1, and a list of two patch embeddings.
        patches = module.patch_embed if leaf == "pos_embed" else module.patch_embed[int(leaf[-1])]
        grid = [side // patch for side, patch in zip(patches.img_size, patches.patch_size, strict=True)]
        # The decorator of timm's function hides its type from the type checker.
        resample: Any = resample_abs_pos_embed
        return resample(value, grid, num_prefix_tokens=shape[1] - patches.num_patches)
    return value


def classifier_of(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names of the parameters of the classifier, or of all classifiers, among `names`."""
    layers = getattr(model, "classifiers", None) or getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{layer}." for layer in ((layers,) if isinstance(layers, str) else layers))
    return {name for name in names if name.startswith(prefixes)}


def _format_shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _format_problems(problems: Mapping[str, Sequence[str]], shown: int = 3) -> str:
    """Format names by problem, the first `shown` of each: "2 missing (a, b), 9 unexpected (c, d, e, ...)"."""
    parts = []
    for problem, names in problems.items():
        if names:
            more = ", ..." if len(names) > shown else ""
            parts.append(f"{len(names)} {problem} ({', '.join(names[:shown])}{more})")
    return ", ".join(parts)
