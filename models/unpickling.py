"""Reading weights files without executing anything that stands in them."""

import pickle
import sys
import types
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # of torch files before version 1.6

# What rebuilds tensors from their storages, and plain containers. These alone are called.
REBUILDERS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
}

# Functions and lower-case classes of settings and random states that checkpoints hold beside the weights. They are
# not called: a placeholder stands for their result.
HARMLESS = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.object",
    "builtins.range",
    "builtins.set",
    "builtins.slice",
    "collections.Counter",
    "collections.defaultdict",
    "copyreg._reconstructor",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "decimal.Decimal",
    "functools.partial",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "types.SimpleNamespace",
}


class Placeholder(type):
    """The class that stands for a global of the file. Its objects hold nothing and do nothing."""

    def __call__(cls, *args, **kwargs) -> Any:
        """The file asks for a call: harmless is what builds an object of some library's class."""
        module, _, name = cls.__qualname__.rpartition(".")
        library_class = module.partition(".")[0] not in sys.stdlib_module_names and name[:1].isupper()
        if not (library_class or cls.__qualname__ in HARMLESS):
            raise pickle.UnpicklingError(f"it would call {cls.__qualname__}")
        return object.__new__(cls)


class Inert(metaclass=Placeholder):
    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def ignore(self, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
        full_name = f"{module}.{name}"
        if full_name in REBUILDERS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return Placeholder(name, (Inert,), {"__qualname__": full_name})


def _load(file: Any, **kwargs) -> Any:
    return Unpickler(file, **kwargs).load()


_PICKLE = types.SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=_load)  # for torch.load


def read_weights(path: str | Path) -> Any:
    """What a safetensors or torch file holds, its tensors on the CPU; settings become inert placeholders.

    Raises:
        ValueError: there is no such file, it is truncated or of another kind, or its pickle would call something.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    with path.open("rb") as file:
        head = file.read(512)
    try:
        if head[8:9] == b"{":
            return load_file(path)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                members = {name.rpartition("/")[2] for name in archive.namelist()}
            if "data.pkl" not in members or "constants.pkl" in members:
                raise ValueError(f"{path} is a zip archive or a TorchScript program, not a file of weights")
            return torch.load(path, map_location="cpu", mmap=True, pickle_module=_PICKLE, weights_only=False)
        if head.startswith(LEGACY_START):
            return torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused, because weights files must hold tensors only: {error}") from None
    except (SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is truncated or damaged; fetch it again ({reason})") from None
    raise ValueError(f"{path} is no weights file: {_kind(head)}")


def _kind(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        return "it is a web page, so the download failed"
    return "it is neither a safetensors nor a torch file"
