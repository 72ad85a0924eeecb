"""Make a reference vector from any module: its outputs with weights that follow from their names.

python scripts/make_vector.py module=timm.models.byoanet:halonet26t input_shape=[1,3,256,256]
    out=tests/vectors/halonet__halonet26t.json.gz source="timm 1.0.31 timm/models/byoanet.py:halonet26t"

The module must be importable: put the authors' repository on PYTHONPATH. A module that does not take one tensor needs a
function of yours that returns a wrapper. tests/vectors/README.md describes the format and how to claim a vector.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import yaml
from pydantic import AfterValidator, Field
from torch import nn

from models.reference import record_vector, save_vector
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.suggestions import nearest

SUFFIX = ".json.gz"


def has_system_and_variant(out: Path) -> Path:
    """Return the path of a vector if its file's name has both parts.

    Raises:
        ValueError: the name is not `<system>__<variant>.json.gz`.
    """
    system, _, variant = out.name.removesuffix(SUFFIX).partition("__")
    if not out.name.endswith(SUFFIX) or not system or not variant:
        raise ValueError(f"Input should be a file <system>__<variant>{SUFFIX}")
    return out


class Options(command_line.Options):
    """Options of the script."""

    module: str = Field(description="what builds the module, as package.module:function (or :Class)")
    input_shape: list[int] = Field(min_length=1, description="shape of the input, in the layout that the module takes")
    out: Annotated[Path, AfterValidator(has_system_and_variant)] = Field(
        description=f"file to write, <system>__<variant>{SUFFIX}"
    )
    kwargs: dict[str, str] = Field({}, description="argument that the module is built with, as YAML")
    source: str = Field("", description="repository, commit, file and function of the module")
    notes: str = Field("", description="what else one must know to repeat the run")
    outputs: list[str] = Field(
        [], description="names of the outputs; by default logits for (B, classes), out, or stage1, stage2, ..."
    )


def build(path: str, kwargs: dict) -> nn.Module:
    """Call the function or class at `package.module:name`.

    Raises:
        ValueError: there is no such module or name, or the call does not return an `nn.Module`.
    """
    package, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"module must be package.module:function, not {path}")
    try:
        namespace = vars(importlib.import_module(package))
    except ModuleNotFoundError as error:
        raise ValueError(f"module={path} cannot be imported: {error}; is its folder on PYTHONPATH?") from None
    if name not in namespace:
        raise ValueError(f"{package} has no {name!r}.{nearest(name, namespace)}")
    module = namespace[name](**kwargs)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{path} returns {type(module).__name__}, not a torch.nn.Module")
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    kwargs = {name: yaml.safe_load(text) for name, text in options.kwargs.items()}
    system, _, variant = options.out.name.removesuffix(SUFFIX).partition("__")
    # Buffers that the constructor draws stay as built.
    torch.manual_seed(0)
    vector = record_vector(
        build(options.module, kwargs),
        options.input_shape,
        system=system,
        variant=variant,
        source=options.source or options.module,
        kwargs=kwargs,
        notes=options.notes,
        output_names=options.outputs,
    )
    save_vector(vector, options.out)
    shapes = ", ".join(f"{name} {tuple(output['shape'])}" for name, output in vector["outputs"].items())
    print(f"{options.out}: {vector['num_params']} parameters, {shapes}")


if __name__ == "__main__":
    with user_errors():
        main()
