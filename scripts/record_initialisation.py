"""Record what the authors' constructor leaves in each parameter of a net, for a comparison with ours.

python scripts/record_initialisation.py module=timm.models.byoanet:halonet26t
    out=tests/vectors/initialisation/halonet__halonet26t.json.gz source="timm 1.0.31 timm/models/byoanet.py:halonet26t"

The module must be importable, as for `scripts/make_vector.py`. Our net is the one that `tests/vectors/claims.py` names
for a reference vector of the same name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, Field

from models.initialisation import record_initialisation
from models.reference import save_vector
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from scripts.make_vector import SUFFIX, build, has_system_and_variant


class Options(command_line.Options):
    """Options of the script."""

    module: str = Field(description="what builds the net, as package.module:function (or :Class)")
    out: Annotated[Path, AfterValidator(has_system_and_variant)] = Field(
        description=f"file to write, <system>__<variant>{SUFFIX}"
    )
    kwargs: dict[str, str] = Field({}, description="argument that the net is built with, as YAML")
    source: str = Field("", description="repository, commit, file and function of the net")
    notes: str = Field("", description="what else one must know to repeat the record")


def main(arguments: Sequence[str] | None = None) -> None:
    options = Options.parse(arguments)
    kwargs = {name: yaml.safe_load(text) for name, text in options.kwargs.items()}
    system, _, variant = options.out.name.removesuffix(SUFFIX).partition("__")
    header = {"system": system, "variant": variant, "source": options.source or options.module, "kwargs": kwargs}
    record = record_initialisation(lambda: build(options.module, kwargs))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_vector({**header, "notes": options.notes, **record}, options.out)
    print(f"{options.out}: {len(record['parameters'])} parameters, {len(record['drop_path'])} drop path rates")


if __name__ == "__main__":
    with user_errors():
        main()
