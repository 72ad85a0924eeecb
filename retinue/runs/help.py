"""`--help`: what there is to choose from, read from the files that define it, without importing torch."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from retinue.utils.paths import CONF, PROJECT

GROUPS = ("model", "task", "head", "data", "recipe", "trainer", "logger", "callbacks", "hydra/launcher", "experiment")
WIDTH, INDENT = 120, 16  # of the help, in characters

EXAMPLES = {
    "train": (
        ("train.py", "BiFormer on the embedded digits"),
        ("train.py model=biformer data=imagenet data.root=/data/in1k", "the paper's recipe"),
        ("train.py model=swin model.mixers=bilevel_routing data=cifar10", "another op in Swin's layout"),
        ("train.py model=timm model.name=resnet50 data=imagenet data.root=...", "any timm model"),
        ("train.py task=detection head=mask_rcnn", "on the embedded scenes; task=segmentation head=upernet"),
        ("train.py data=coco data.root=... head=retinanet model=swin model.size=tiny", "a detector"),
        ("train.py trainer=ddp trainer.devices=8 trainer.precision=bf16 ...", "eight GPUs"),
        ("train.py -m model=biformer,swin seed=0,1,2", "a sweep"),
    ),
    "eval": (
        ("eval.py run=outputs/classification/digits/...", "a finished run, its own config"),
        ("eval.py model=biformer weights=biformer_tiny_best.pth data=imagenet data.root=...", "released weights"),
        ("eval.py run=outputs/detection/... save_images=20", "with pictures of what was found"),
        ("eval.py model=timm model.name=resnet50 model.pretrained=true data=imagenet ...", "timm's weights"),
    ),
}


def wants_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("--help", "-h") for argument in arguments)


def write_help(program: str) -> None:
    """Print usage, examples and the choices of every group."""
    print(f"python {program}.py [group=choice] [key=value] ...\n")
    width = max(len(command) for command, _ in EXAMPLES[program])
    for command, what in EXAMPLES[program]:
        print(f"  python {command:{width}}  # {what}")
    print()
    for title, choices in groups().items():
        lines = choices if title in ("model", "experiment") else [", ".join(choices)]
        for i, line in enumerate(lines):
            first = f"{title + ':':{INDENT}}" if i == 0 else " " * INDENT
            print(textwrap.fill(line, WIDTH, initial_indent=first, subsequent_indent=" " * (INDENT + 2)))
    print("\n--cfg job shows the composed config with every key; --hydra-help shows Hydra's own flags.")


def groups() -> dict[str, list[str]]:
    """Choices by group: models with their sizes, experiments by paper, and the ops that `model.mixers=` takes."""
    found = {group: _names(CONF / group, ".yaml") for group in GROUPS}
    for group in ("data", "head"):
        found[group] = [name for name in found[group] if not name.startswith("default_")]
    found["model"] = [_with_sizes(name) for name in found["model"]]
    papers: dict[str, list[str]] = {}
    for name in found["experiment"]:
        paper, _, row = name.rpartition("/")
        papers.setdefault(paper, []).append(row)
    found["experiment"] = [f"{paper}/{{{', '.join(rows)}}}" for paper, rows in papers.items()]
    found["mixers"] = [name for name in _names(PROJECT / "ops" / "attention", ".py") if name != "__init__"]
    return {title: choices for title, choices in found.items() if choices}


def _with_sizes(model: str) -> str:
    sizes = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text()).get("sizes")
    return f"{model} (size={' | '.join(sizes)})" if sizes else model


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{suffix}"))
