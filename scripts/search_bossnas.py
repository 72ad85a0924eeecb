"""Search a hybrid of convolution and attention by BossNAS (arXiv:2103.12424), without labels.

    python scripts/search_bossnas.py                                      # on the digits, in minutes
    python scripts/search_bossnas.py name=in1k data=imagenet data.root=/data/in1k trainer.accumulate_grad_batches=64

All other keys are for train.py. The blocks of the supernet are trained one after the other, each in a run of
task=bossnas. After each, all paths of the block are rated by how well they predict the ensemble of all paths, on
training images that were held out, and the best path is chosen. <folder>/<name>/ holds block-<k>/ and ratings-<k>.csv.
The same command resumes the search. docs/architecture_search.md explains it.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from models.supernets.hytra_space import encoding, from_text
from retinue.benchmarks.timing import pick_device
from retinue.results.bossnas_search import BlockSearch
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    name: str = Field("digits", description="name of the search's folder")
    folder: Path = Field(Path("outputs/bossnas_search"), description="folder of the searches")
    device: str = Field("auto", description="device that rates paths: auto, cpu or cuda")


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    register_resolvers()
    folder = (options.folder / options.name).absolute()
    search = BlockSearch(folder, overrides, pick_device(options.device))
    chosen = []
    for block, path in enumerate(search.go()):
        chosen.append(from_text(path))
        print(f"block {block}: {path}", flush=True)
    net = f"+model.args.encoding={command_line.to_text(encoding(chosen))}"
    data = [override for override in overrides if override.startswith("data")]
    print(f"found: python train.py {shlex.join(['model=bossnas', net, *data])}")
    print(folder)


if __name__ == "__main__":
    with user_errors(CONF, "train"):
        main()
