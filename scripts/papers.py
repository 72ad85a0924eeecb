"""What follows from the papers' tables in papers: the overview docs/papers.md, and an experiment for each row.

    python scripts/papers.py            # after a change of papers or conf/model

conf/experiment/<paper>/<size>_in1k.yaml is written for the rows that a training from scratch reproduces, and
<size>_<head>_<schedule>.yaml for the detectors and segmentors whose rows have a `train`.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from retinue.results.papers import DENSE, dense_experiments, experiments, list_papers, model_choice, read_paper
from retinue.utils.files import replacing
from retinue.utils.paths import CONF, PROJECT

OVERVIEW = PROJECT / "docs/papers.md"
HEAD = """\
# Papers

```
python scripts/reproduce.py paper=biformer                              # our parameters and MACs beside its own
python scripts/reproduce.py paper=biformer measure=true out=biformer.md                 # images/s and memory, too
python scripts/reproduce.py paper=cswin weights.cswin_tiny=FILE data.root=/data/in1k    # top-1 of the authors' weights
python train.py experiment=cswin/tiny_in1k data.root=/data/in1k trainer=ddp trainer.devices=8   # a row, trained anew
```

`table=detection` and `table=segmentation` are a paper's others. Accuracy is that of finished runs below `outputs/`, or
of the weights that are named. What is off by more than 1 % and half of the last printed digit (accuracy: by more than
0.1 points, and outside the runs' interval) is marked ✗, or * where the reason is known; what is missing is named, with
the command that produces it.

The tables are `papers/<name>.yaml`: facts, with the authors' files that they were read from. Each row that a
training from scratch on ImageNet-1k reproduces has an experiment, `conf/experiment/<name>/`: the model's recipe, of
which `conf/model/` says how near to the paper's it is, and what the row's `train` adds to it. This page and the
experiments are written by `python scripts/papers.py`; run it after a change of `papers` or `conf/model`.

Parameters and top-1 below are the papers' own, over all image sizes; – where the files that were read give none. Nets
are registry names, ours or timm's.

| name | paper | year | arXiv | nets here | params (M) | top-1 (%) | licence of the code |
|---|---|---|---|---|---|---|---|
"""


def overview() -> str:
    """docs/papers.md: a line for each paper; those whose nets are here come first."""
    papers = {name: read_paper(name) for name in list_papers()}
    lines = sorted((not _nets(paper), _line(name, paper)) for name, paper in papers.items())
    return HEAD + "".join(line for _, line in lines)


def _nets(paper: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["net"] for row in paper["variants"] if "net" in row))


def _line(name: str, paper: dict[str, Any]) -> str:
    arxiv = str(paper["arxiv"] or "").partition(" ")[0]
    title = str(paper["title"]).replace("|", "\\|")
    code = str(paper["code"] or "")
    cells = (
        f"`{name}`",
        f"[{title}]({code.partition(' ')[0]})" if code.startswith("https://") else title,
        str(paper["year"] or "–"),
        f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "–",
        ", ".join(f"`{net}`" for net in _nets(paper)) or "–",
        _range(row["params_m"] for row in paper["variants"]),
        _range(row["top1"] for row in paper["variants"] if row.get("dataset", "ImageNet").startswith("ImageNet")),
        str(paper["licence"] or "–"),
    )
    return f"| {' | '.join(cells)} |\n"


def _range(values: Any) -> str:
    """`13.1 to 56.8`"""
    figures = sorted(value for value in values if value is not None)
    return " to ".join(f"{value:g}" for value in dict.fromkeys((figures[0], figures[-1]))) if figures else "–"


def experiment(name: str, row: dict[str, Any]) -> str:
    """conf/experiment/<name>.yaml, which opens with the row that it reproduces."""
    paper = read_paper(name.partition("/")[0])
    units = {"params_m": "{:g} M parameters", "macs_g": "{:g} GFLOPs", "top1": "top-1 {:g} %"}
    figures = ", ".join(text.format(row[key]) for key, text in units.items() if row[key])
    arxiv = f"arXiv:{paper['arxiv']}, " if paper["arxiv"] else ""
    what = (
        f"{row['name']} on ImageNet-1k at {row['input']} px: {figures} "
        f"({arxiv}repository's {paper['source']['variants'].removesuffix('.md')})."
    )
    choices = model_choice(row["net"], row.get("args", {}), row["input"]) + row.get("train", [])
    return _yaml(what, name, "data.root=/data/in1k", [*choices, "data=imagenet"])


def dense_experiment(name: str, table: str, row: dict[str, Any]) -> str:
    """The same for a detector or segmentor, which starts from the weights of a classifier."""
    paper = read_paper(name.partition("/")[0])
    units = {
        "params_m": "{:g} M parameters", "macs_g": "{:g} GFLOPs",
        "box_ap": "box AP {:g} %", "mask_ap": "mask AP {:g} %",
        "miou_ss": "mIoU {:g} %", "miou_ms": "{:g} % at several scales, with flips",
    }  # fmt: skip
    figures = ", ".join(text.format(row[key]) for key, text in units.items() if row.get(key))
    data = DENSE[table]
    what = (
        f"{row.get('detector') or row['head']} with {row['backbone']} on {data.upper()}, {row['schedule']}: {figures} "
        f"(arXiv:{paper['arxiv']}, repository's {paper['source'][table].removesuffix('.md')})."
    )
    choices = model_choice(row["net"], row.get("args", {}), None) + row["train"]
    return _yaml(what, name, f"weights=CLASSIFIER.pth data.root=/data/{data}", [*choices, f"data={data}"])


def _yaml(what: str, name: str, given: str, choices: Sequence[str]) -> str:
    """An experiment that makes these choices, and what it is."""
    groups = [choice.split("=", 1) for choice in choices if "." not in choice.split("=", 1)[0]]
    keys = OmegaConf.from_dotlist([choice.lstrip("+") for choice in choices if "." in choice.split("=", 1)[0]])
    defaults = [f"  - override /{group}: {chosen}\n" for group, chosen in groups]
    return (
        "# @package _global_\n"
        + textwrap.indent(textwrap.fill(what, 118), "# ")
        + f"\n# python train.py experiment={name} {given} trainer=ddp trainer.devices=8\ndefaults:\n"
        + "".join(defaults)
        + yaml.dump(OmegaConf.to_container(keys), sort_keys=False, default_flow_style=None)
    )


def files() -> dict[Path, str]:
    """Every file that this script writes, and its text."""
    rows = {name: row for paper in list_papers() for name, row in experiments(paper).items()}
    dense = {name: row for paper in list_papers() for name, row in dense_experiments(paper).items()}
    texts = {name: experiment(name, row) for name, row in rows.items()}
    texts |= {name: dense_experiment(name, table, row) for name, (table, row) in dense.items()}
    return {OVERVIEW: overview()} | {CONF / f"experiment/{name}.yaml": text for name, text in texts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    for path, text in files().items():
        with replacing(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
