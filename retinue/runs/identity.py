"""Identity of a run: the part of its config that changes its result, and the folder that follows from it.

The rule, version 2. The identity of a config is the config without

- the keys in `NOT_RESULT`, which change how a run is carried out or shown, and the seed, which the folder names itself;
- the menu of sizes: `model` is the chosen net's registry name and arguments, `head.size` is the chosen size's entry;
- `_target_`, which names a class of the code, and `recipe` in `model` and `head`, which only chooses a default;
- a section or key that another key switches off (`SWITCHES`), such as `task.distillation` without a teacher;
- a detector's `task.test` without several views, which leaves the detections as they are;
- `data.own`, since the values of `data` that a config leaves open are filled in before (`retinue.runs.preprocessing`);
- the value of `task.compile`, which counts as false: like another device, a compiled net differs by rounding and by
  the numbers that dropout draws;
- the path of a weights file or a map of its classes (`WEIGHTS`), whose content counts: the SHA-256 of the file, which
  a run's config keeps as `weights_sha256`; a file that is not there counts as its path;
- a batch size that was reduced for a small training set: the recipe's own counts, which is known before the data are;
- null and empty values: an optional key that is null asks for nothing, so that adding one changes no folder. A head's
  `size` and `args` keep null values, since they are changes of a package's config, where null replaces a value.

A change of this rule is a new `IDENTITY_VERSION`, and then every run has a new folder.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from retinue.runs.preprocessing import resolved_data
from retinue.utils.sizes import model_name, resolve, size_pixels
from retinue.utils.tasks import CLASSIFIERS

IDENTITY_VERSION = 2

# Section ("" is the top level) -> keys that do not change the result.
NOT_RESULT = {
    "": (
        *("hydra", "run", "run_dir", "rerun", "seed", "checkpoint", "logger", "ops"),
        *("save_images", "save_predictions", "save_maps", "save", "pictures", "cache", "weights_sha256", "calibrate"),
    ),
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps"),
    "data": ("num_workers", "own", "cache"),
    "task": ("log_grad_norm",),
}

# Section or key -> the key that switches it off when it is null.
SWITCHES = {
    "task.distillation": "task.distillation.teacher",
    "task.distillation.maps": "task.distillation.maps.loss",
    "task.token_labels": "task.token_labels.source",
    "recipe.ema": "recipe.ema.decay",
    "drop_classifier": "weights",
    "classifier_map": "weights",
    "data.repeat_threshold": "data.sampler",
}

# Keys of weights files and of the map of their classes, and the key under which a run's config keeps the SHA-256 of
# these files by these keys.
# A classifier's `task.distillation.teacher` is a net's name and counts as such, since there is no such file.
WEIGHTS = (
    "weights",
    "classifier_map",
    "task.distillation.weights",
    "task.distillation.teacher",
    "task.teacher.weights",
)
WEIGHTS_DIGESTS = "weights_sha256"


def identity(cfg: Mapping) -> dict[str, Any]:
    """Return what in a config changes the run's result; the seed is left out.

    Args:
        cfg: a composed config, or a saved one as plain mappings. A saved config whose net cannot be told, as an
            earlier version of the project may have left it, keeps its section `model` without the menu of sizes.
    """
    config = _resolved(cfg)
    # Before the weights are replaced by their digests: the preprocessing follows the path of a run.
    if isinstance(config.get("data"), dict):
        config["data"] = resolved_data(config)
    digests = dict(cfg.get(WEIGHTS_DIGESTS) or {})
    for key in WEIGHTS:
        if path := _select(config, key):
            _set(config, key, digests.get(key) or weights_digest(path) or path)
    if isinstance(config.get("model"), dict):
        config["model"] = _chosen_net(config)
    if isinstance(config.get("head"), dict):
        config["head"] = _chosen_head(config)
    if isinstance(config.get("recipe"), dict) and config["recipe"].get("reduced_from"):
        config["recipe"] = config["recipe"] | {"batch_size": config["recipe"]["reduced_from"], "reduced_from": None}
    for section, keys in NOT_RESULT.items():
        if isinstance(config.get(section), dict):
            config[section] = {key: value for key, value in config[section].items() if key not in keys}
    if _select(config, "task.compile") is not None:
        config["task"] = config["task"] | {"compile": False}
    for switched, switch in SWITCHES.items():
        if _select(config, switch) is None:
            _remove(config, switched)
    test = _select(config, "task.test")
    if _select(config, "task.name") == "detection" and test and list(test["scales"]) == [1.0] and not test["flip"]:
        _remove(config, "task.test")
    return _without_empty(config, "")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their dotted names, such as `recipe.optimizer.lr`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fingerprint(cfg: DictConfig) -> str:
    """Return the SHA-256 of the identity and the seed, in hexadecimal."""
    return _digest(identity(cfg), cfg.seed)


def run_folder(cfg: DictConfig) -> str:
    """Return `<task>/<data>/<model>/<8 hex of the identity>-s<seed>`: the same for the same experiment, anywhere."""
    names = (cfg.task.name, cfg.data.name, model_name(cfg.model, size_pixels(resolved_data(cfg))))
    labels = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    return "/".join([*labels, f"{_digest(identity(cfg))[:8]}-s{cfg.seed}"])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([IDENTITY_VERSION, *parts], sort_keys=True).encode()).hexdigest()


def _resolved(cfg: Mapping) -> dict[str, Any]:
    """Return the config's keys that change the result as plain values; Hydra's own section cannot be resolved."""
    kept = [key for key in cfg if key not in NOT_RESULT[""]]
    return {key: OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
            for key in kept}  # fmt: skip


def _chosen_net(config: Mapping[str, Any]) -> dict[str, Any]:
    model = config["model"]
    try:
        dense = config["data"]["task"] not in CLASSIFIERS
        name, args = resolve(model, size_pixels(config["data"]), under_head=dense)
    except (KeyError, TypeError, ValueError):
        return {key: value for key, value in model.items() if key not in ("recipe", "sizes")}
    return {"name": name, **args}


def _chosen_head(config: Mapping[str, Any]) -> dict[str, Any]:
    head = {key: value for key, value in config["head"].items() if key not in ("recipe", "sizes")}
    if sizes := config["head"].get("sizes"):
        size = head.get("size") or ("small" if config["data"].get("kind") == "small" else "full")
        head["size"] = sizes.get(size, size)
    return head


def weights_digests(cfg: Mapping) -> dict[str, str]:
    """Return the SHA-256 of each weights file that a config names and that is there, by the keys in `WEIGHTS`."""
    config = _resolved(cfg)
    paths = {key: path for key in WEIGHTS if (path := _select(config, key))}
    return {key: digest for key, path in paths.items() if (digest := weights_digest(path))}


def weights_digest(path: str) -> str | None:
    """Return the SHA-256 of a file, also of a hub's, in hexadecimal, or None if it cannot be read."""
    try:
        if path.startswith("hf-hub:"):
            # Only here, since torch is slow to import.
            from models import hub

            path = str(hub.fetch(path) / hub.WEIGHTS)
        facts = os.stat(path)
        return _file_digest(os.path.abspath(path), facts.st_mtime_ns, facts.st_size)
    except (OSError, ValueError):
        return None


@cache
def _file_digest(path: str, mtime: int, size: int) -> str:
    """Return the SHA-256 of a file; the time and the size are there to read a changed file anew."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set(config: dict[str, Any], name: str, value: Any) -> None:
    """Set the key called `name`, dotted, in nested dicts."""
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


def _select(config: Any, name: str) -> Any:
    """Return the value called `name`, dotted, or None if there is none."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _remove(config: dict[str, Any], name: str) -> None:
    """Remove the key called `name`, dotted, from the config; its sections are copied, since others may hold them."""
    section, _, rest = name.partition(".")
    if not rest:
        config.pop(section, None)
    elif isinstance(config.get(section), dict):
        config[section] = dict(config[section])
        _remove(config[section], rest)


def _without_empty(value: Any, name: str) -> Any:
    """Return a value without `_target_`, null and empty values within it; lists stay as they are."""
    if not isinstance(value, dict) or name in ("head.size", "head.args"):
        return value
    pruned = {
        key: _without_empty(entry, f"{name}.{key}".lstrip(".")) for key, entry in value.items() if key != "_target_"
    }
    return {key: entry for key, entry in pruned.items() if entry is not None and entry != {}}
