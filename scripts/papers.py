"""Generate docs/papers.md and conf/experiment from the papers' tables, which papers/ holds.

    python scripts/papers.py            # after a change of papers or conf/model

The script writes conf/experiment/<paper>/<size>_in1k.yaml for the rows that a training from scratch reproduces, and
<size>_<head>_<schedule>.yaml for the detectors and segmentors whose rows have a `train`.
"""

from collections.abc import Sequence

from retinue.results.generated import generated_files
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.files import write_text


class Options(command_line.Options):
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    Options.parse(arguments)
    for path, text in generated_files().items():
        write_text(path, text)


if __name__ == "__main__":
    with user_errors():
        main()
