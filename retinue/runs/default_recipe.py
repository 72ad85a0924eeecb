"""The recipe that a run gets when the command line names none."""

from typing import Any

from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf


def recipe_for(task: str, data: str, model: str, head: str) -> str:
    """Return the name of the default recipe; conf/train.yaml interpolates it into the defaults list.

    On small data it is the small recipe of the task. On other data it is the one that the head's yaml names, or for
    classification the one that the model's yaml names.

    Args:
        task: choice of the config group `task`.
        data: choice of the config group `data`; `none` if the command line chooses none.
        model: choice of the config group `model`.
        head: choice of the config group `head`; `none` if the command line chooses none.
    """
    small = _declared("data", data, "kind") in (None, "small")
    if task == "classification":
        return "small_data" if small else _declared("model", model, "recipe") or "deit"
    head = f"default_{task}" if head == "none" else head
    return f"small_{task}" if small else _declared("head", head, "recipe") or f"small_{task}"


def _declared(group: str, choice: str, key: str) -> Any:
    """Return `key` of the group's section as the choice's yaml gives it, or a yaml that it inherits from.

    The yaml files are those that Hydra finds for the running command, in conf/ or in its `--config-dir`; folders of
    `hydra.searchpath` are not known here. None stands for a key or a file that does not exist: Hydra itself reports a
    wrong name.
    """
    return _read(f"{group}/{choice}", group, key)


def _read(path: str, group: str, key: str) -> Any:
    loader: Any = GlobalHydra.instance().config_loader()
    loaded = loader.repository.load_config(path)
    if loaded is None:
        return None
    # A file with the header `@package _global_` holds the whole config, another one its group's section alone.
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
    """Return the key as an entry of the defaults list of the file `path` gives it."""
    if default.is_override() or (isinstance(default, GroupDefault) and not isinstance(default.value, str)):
        return None
    default.update_parent(path.rpartition("/")[0], "")
    inherited = default.get_config_path()
    # Only files of the same group can give the group's keys.
    return _read(inherited, group, key) if inherited.startswith(f"{group}/") else None
