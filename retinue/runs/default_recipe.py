"""Choose the recipe of a run whose command line names none."""

from typing import Any

from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from retinue.utils.tasks import CLASSIFIERS


def recipe_for(task: str, data: str, model: str, head: str, method: str = "none") -> str:
    """Return the name of the default recipe; conf/train.yaml interpolates it into the defaults list.

    On small data the task's small recipe is the default: `small_data`, `small_detection`, ... On other data it is the
    recipe that the head's yaml names; for a classifier the recipe that the model's yaml names, for multi-label
    classification `multi_label`, for pretraining the recipe that the method's yaml names. A model's yaml that names no
    recipe gets `deit`, another yaml that names none the task's small recipe.

    Args:
        task: choice of the config group `task`.
        data: choice of the config group `data`; `none` if the command line chooses none.
        model: choice of the config group `model`.
        head: choice of the config group `head`; `none` if the command line chooses none.
        method: choice of the config group `method`; `none` if the command line chooses none.
    """
    small = _declared("data", data, "kind", "small") == "small"
    if task == "pretraining":
        method = f"default_{task}" if method == "none" else method
        return "small_pretraining" if small else _declared("method", method, "recipe", "small_pretraining")
    if task in CLASSIFIERS:
        own = "small_data" if task in ("classification", "hashing") else f"small_{task}"
        large = task if task == "multi_label" else _declared("model", model, "recipe", "deit")
        return own if small else large
    head = f"default_{task}" if head == "none" else head
    return f"small_{task}" if small else _declared("head", head, "recipe", f"small_{task}")


def _declared(group: str, choice: str, key: str, default: str) -> str:
    """Return `key` of the group's section from the yaml of `choice` or from a yaml that it inherits; else `default`.

    The yaml files are those that Hydra finds for the running command, in conf/ or in its `--config-dir`; folders of
    `hydra.searchpath` are not known here. A file that does not exist gives `default` too: Hydra itself reports a wrong
    name.
    """
    value = _read(f"{group}/{choice}", group, key)
    return default if value is None else str(value)


def _read(path: str, group: str, key: str) -> Any:
    """Return the key as the file `path` or a file that it inherits gives it; None if they do not."""
    loader: Any = GlobalHydra.instance().config_loader()
    loaded = loader.repository.load_config(path)
    if loaded is None:
        return None
    # A file with the header `@package _global_` has the keys of the whole config, others have only the group's keys.
    name = f"{group}.{key}" if loaded.header["package"] == "_global_" else key
    written = OmegaConf.select(loaded.config, name)
    inherited: list[InputDefault] = list(loaded.defaults_list or ())
    if not any(default.is_self() for default in inherited):
        inherited.append(ConfigDefault(path="_self_"))
    # A later entry of a defaults list wins over an earlier one.
    for default in reversed(inherited):
        value = written if default.is_self() else _read_default(default, path, group, key)
        if value is not None:
            return value
    return None


def _read_default(default: InputDefault, path: str, group: str, key: str) -> Any:
    """Return the key as one entry of a defaults list, that of the file `path`, gives it."""
    if default.is_override() or (isinstance(default, GroupDefault) and not isinstance(default.value, str)):
        return None
    default.update_parent(path.rpartition("/")[0], "")
    inherited = default.get_config_path()
    # Only files of the same group can give the group's keys.
    return _read(inherited, group, key) if inherited.startswith(f"{group}/") else None
