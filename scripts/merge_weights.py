"""Merge the weights of several nets of one kind into one file.

    python scripts/merge_weights.py RUN RUN RUN save=soup.safetensors                  # their mean: a uniform soup
    python scripts/merge_weights.py RUN RUN RUN method=greedy save=soup.safetensors    # by validation
    python scripts/merge_weights.py A.ckpt B.ckpt method=arithmetic base=C.ckpt scales=[0.5,-0.3] save=D.safetensors

A net is the folder of a run, which stands for its best weights, or a weights file. A greedy soup takes nets in the
order of their figure on the validation split of the runs' data, and keeps each net with which the soup's figure does
not fall (model soups, arXiv:2203.05482). Task arithmetic adds scaled differences from a base (arXiv:2212.04089).
`eval.py run=RUN weights=soup.safetensors` tests the result.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from safetensors.torch import save_file

from models.merging import add_differences, check_same_net, contiguous, mean
from retinue.runs.soup import Validation, greedy_soup, weights_of
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.files import replacing


class Options(command_line.Options):
    nets: list[Path] = Field(description="folders of runs or weights files, also without nets=", min_length=1)
    method: Literal["uniform", "greedy", "arithmetic"] = Field("uniform", description="how the weights are merged")
    base: Path | None = Field(None, description="arithmetic: the net from which the others were trained")
    scales: list[float] = Field([1.0], description="arithmetic: factor of each difference, or one for all")
    save: Path = Field(description="safetensors file to write")

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        arithmetic = self.method == "arithmetic"
        if arithmetic != (self.base is not None):
            raise ValueError("base is for method=arithmetic, which needs it: base=RUN or base=FILE")
        if arithmetic and len(self.scales) not in (1, len(self.nets)):
            raise ValueError(f"scales needs 1 number or one for each of the {len(self.nets)} nets")
        return self


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    nets = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    others = [argument for argument in arguments if argument not in nets]
    options = Options.parse([f"nets=[{','.join(nets)}]", *others] if nets else others)
    command_line.check_suffixes("save", [options.save], [".safetensors"])
    paths = options.nets if options.base is None else [options.base, *options.nets]
    states = [weights_of(path) for path in paths]
    for path, state in zip(paths, states, strict=True):
        check_same_net(states[0], state, str(paths[0]), str(path))

    members = list(paths)
    if options.method == "greedy":
        validate = Validation(options.nets)
        merged, chosen, figures, best = greedy_soup(states, validate)
        members = [paths[position] for position in chosen]
        for position, path in enumerate(paths):
            print(f"{path}  {validate.figure} {figures[position]:.4f}  {'taken' if position in chosen else 'left out'}")
        print(f"soup of {len(members)}  {validate.figure} {best:.4f}")
    elif options.method == "arithmetic":
        scales = options.scales * len(options.nets) if len(options.scales) == 1 else options.scales
        merged = add_differences(states[0], states[1:], scales)
    else:
        merged = mean(states)
    with replacing(options.save) as path:
        save_file(contiguous(merged), path, {"method": options.method, "nets": json.dumps([str(m) for m in members])})
    print(options.save)


if __name__ == "__main__":
    with user_errors():
        main()
