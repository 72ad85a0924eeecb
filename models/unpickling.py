"""Read weights files without executing code that they contain.

A torch file is a pickle, and a pickle may call any function. Released checkpoints often hold settings and random states
beside the weights, which `torch.load(weights_only=True)` refuses. So our unpickler rebuilds tensors and plain
containers, replaces objects of other classes by inert placeholders, and refuses a file that would call anything else.
"""

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

from models.hub import WEIGHTS, fetch, is_hub_name

# First bytes of torch files from before version 1.6.
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)

# Functions and classes that rebuild tensors from their storages, and plain containers. Nothing else is called.
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

# Functions and lower-case classes of the settings and random states that checkpoints hold beside the weights. They are
# not called; a placeholder stands for the result of the call.
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
    """Metaclass of the classes that stand for the globals of a file, which are its functions and classes."""

    def __call__(cls, *args, **kwargs) -> Any:
        """Return an inert object in place of the result of a call that the file asks for.

        Only calls that build an object are replaced: those of `HARMLESS`, and those of a global that begins with a
        capital letter, as classes do, and is not in Python's standard library.

        Raises:
            pickle.UnpicklingError: The file asks for any other call.
        """
        module, _, name = cls.__qualname__.rpartition(".")
        library_class = module.partition(".")[0] not in sys.stdlib_module_names and name[:1].isupper()
        if not (library_class or cls.__qualname__ in HARMLESS):
            raise pickle.UnpicklingError(f"it would call {cls.__qualname__}")
        return object.__new__(cls)


class Inert(metaclass=Placeholder):
    """Object that holds nothing and does nothing, whatever state or items the file gives it."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def ignore(self, *args, **kwargs) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class Unpickler(pickle.Unpickler):
    """Unpickler that imports `REBUILDERS` and torch's dtypes, and makes a placeholder for every other global."""

    def find_class(self, module: str, name: str) -> Any:
        # Pickles of Python 2 have that version's names of the standard library.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f"{module}.{name}"
        if full_name in REBUILDERS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        return Placeholder(name, (Inert,), {"__qualname__": full_name})


def _load(file: Any, **kwargs) -> Any:
    return Unpickler(file, **kwargs).load()


# `torch.load` takes a module like `pickle` as its argument `pickle_module`.
_PICKLE = types.SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=_load)


def read_weights(path: str | Path) -> Any:
    """Read a safetensors or torch file with all tensors on the CPU, and without executing code of the file.

    Args:
        path: The file. Its kind follows from its first bytes, not from its name. `hf-hub:owner/name` stands for the
            safetensors file of a hub's repository, which is downloaded.

    Returns:
        The content: a mapping from names to tensors, or what a checkpoint holds around such a mapping. Objects that
        are neither tensors nor plain containers, numbers or strings are inert placeholders.

    Raises:
        ValueError: There is no such file, it is truncated or of another kind, or it would call a function that builds
            no tensor.
    """
    path = fetch(str(path)) / WEIGHTS if is_hub_name(path) else Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    with path.open("rb") as file:
        head = file.read(512)
    try:
        # A safetensors file begins with the header's length in 8 bytes, then the header, which is JSON.
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
    raise ValueError(f"{path} is no weights file: {_describe(head)}")


def _describe(head: bytes) -> str:
    """Say what a file is that is no weights file, from its first bytes."""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        return "it is a web page, so the download failed"
    return "it is neither a safetensors nor a torch file"
