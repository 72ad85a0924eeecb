"""Print `--help`: the choices on the command line, read from the files that define them, without importing torch.

--help                    usage, examples and the groups, on one screen
--help model              the choices of a group
--help model=swin         one choice: its keys with their meanings; a net's sizes and arguments
--help ops                the token mixers; `--help ops=agent` shows the arguments of one
--help gates              the gates; `--help gates=ela` shows the arguments of one
--help reduction          the token reductions; `--help reduction=tome` shows the arguments of one
--help experiment=swin    the rows of a paper's tables
"""

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import yaml

from retinue.runs.schema import PROGRAMS, Checkpoint, Ops, meaning
from retinue.runs.signatures import (
    Argument,
    Class,
    find_gates,
    find_net,
    find_ops,
    find_reductions,
    list_arguments,
    list_gate_places,
    list_softmax_options,
)
from retinue.utils.paths import CONF, list_group
from retinue.utils.suggestions import nearest

GROUPS = ("model", "ops", "gates", "reduction", "task", "head", "method", "data", "recipe", "trainer", "logger",
          "callbacks", "hydra/launcher", "experiment", "probe", "panel")  # fmt: skip
# Groups of one program only
GROUPS_OF = {"probe": "probe", "panel": "eval", "logger": "train", "callbacks": "train"}
WIDTH = 100  # characters in a line
FLAGS = ("--help", "-h")

# Groups of classes -> the key that takes their names, and the function that finds the classes.
CLASSES = {
    "ops": ("model.mixers", find_ops),
    "gates": ("model.gates", find_gates),
    "reduction": ("model.reduction", find_reductions),
}
# Arguments that every op, gate, reduction and net receives from the net or the task, not from the user.
OP_GIVEN = ("dim", "num_heads", "place", "channels", "first", "depth", "device", "dtype")
NET_GIVEN = ("num_classes", "in_chans", "device", "dtype")

EXAMPLES = {
    "train": (
        ("train.py", "BiFormer on the embedded digits"),
        ("train.py model=biformer data=imagenet data.root=DIR", "the paper's recipe"),
        ("train.py model=swin model.mixers=agent data=cifar10", "another op in Swin's layout"),
        ("train.py model=timm model.name=resnet50", "any net of timm"),
        ("train.py data=coco data.root=DIR head=retinanet", "data=coco sets the task"),
        ("train.py trainer=ddp trainer.devices=8", "eight GPUs"),
        ("train.py -m model=biformer,swin seed=0,1,2", "a sweep of six runs"),
    ),
    "eval": (
        ("eval.py run=outputs/classification/digits/...", "a finished run"),
        ("eval.py run=outputs/detection/... save_images=20", "with pictures"),
        ("eval.py model=biformer weights=FILE data=imagenet data.root=DIR", "released weights"),
        ("eval.py model=timm model.name=resnet50 model.pretrained=true", "timm's weights"),
        ("eval.py run=DIR panel=robustness", "corruptions, attacks"),
    ),
    "predict": (
        ("predict.py run=outputs/classification/... images=photos", "the images in a folder"),
        ("predict.py run=DIR images='photos/**/*.jpg' pictures=true", "with pictures"),
        ("predict.py run=DIR images=a.png save=predictions", "one image"),
        ("predict.py model=biformer weights=FILE data=imagenet images=DIR", "released weights"),
    ),
    "probe": (
        ("probe.py run=outputs/classification/... probe=linear", "a finished run"),
        ("probe.py -m run=DIR probe=linear,knn,few_shot", "three probes"),
        ("probe.py model=timm model.name=resnet50 model.pretrained=true", "timm's weights"),
        ("probe.py run=DIR probe=attentive probe.pool=simpool", "an attentive pool"),
        ("probe.py run=DIR probe=ood probe.far=[fashion_mnist]", "other data"),
    ),
}


def wants_help(arguments: Sequence[str]) -> bool:
    """Tell whether the command line asks for help."""
    return any(argument in FLAGS for argument in arguments)


def write_help(program: str, arguments: Sequence[str]) -> None:
    """Print the help on the first argument that is not a flag, or the overview if there is none.

    Raises:
        ValueError: there is no such group or choice.
    """
    topics = [argument for argument in arguments if not argument.startswith("-")]
    print("\n".join(_topic(topics[0]) if topics else _overview(program)))


def list_choices(group: str) -> list[str]:
    """Return the names that `group=` takes, sorted; for experiments `<paper>/<row>`."""
    return list(CLASSES[group][1]()) if group in CLASSES else list_group(group)


def _overview(program: str) -> list[str]:
    lines = [f"Usage: python {program}.py [group=choice] [key=value] ...", ""]
    width = max(len(command) for command, _ in EXAMPLES[program])
    lines += [f"  python {command:{width}}  # {meaning}" for command, meaning in EXAMPLES[program]]
    lines += ["", "Groups and the number of their choices:"]
    for group in GROUPS:
        if GROUPS_OF.get(group, program) != program:
            continue
        choices = list_choices(group)
        names = ", ".join(choices)
        shown = names if len(names) <= WIDTH - 26 else f"--help {group} lists them"
        lines.append(f"  {group:16} {len(choices):4}   {shown}")
    return [
        *lines,
        "Keys that belong to no group:",
        *_table(_own_keys(program)),
        "",
        "model.mixers= takes ops, model.gates= gates: one for all stages, or a list with an entry for each.",
        "--help GROUP          the choices of a group, such as --help model",
        "--help GROUP=CHOICE   keys and meanings, such as --help model=swin, --help ops=agent",
        "--cfg job, --hydra-help   the composed config with every key; Hydra's own flags",
    ]


def _topic(topic: str) -> list[str]:
    group, _, choice = topic.partition("=")
    if group not in GROUPS:
        raise ValueError(f"there is no group {group!r}.{nearest(group, GROUPS)} There are: {', '.join(GROUPS)}")
    choices = list_choices(group)
    papers = sorted({name.partition("/")[0] for name in choices})
    if not choice:
        return _papers(choices) if group == "experiment" else _choices(group, choices)
    if group == "experiment" and choice in papers:
        return _rows(choice, choices)
    if choice not in choices and not (CONF / group / f"{choice}.yaml").is_file():
        known = papers if group == "experiment" and "/" not in choice else choices
        raise ValueError(f"{group}={choice} is not there.{nearest(choice, known)} There are: {', '.join(known)}")
    if group in CLASSES:
        return _class(group, choice)
    lines = _keys(group, choice)
    return lines + _net(choice) if group == "model" else lines


def _choices(group: str, choices: Iterable[str]) -> list[str]:
    """Return a line for each choice: its name and the first sentence of its docstring or comment."""
    meanings = {
        name: CLASSES[group][1]()[name].summary if group in CLASSES else _header(group, name) for name in choices
    }
    lines = [f"{group}=", *_table(meanings.items()), ""]
    return [*lines, f"--help {group}=CHOICE shows one of them."]


def _papers(experiments: Iterable[str]) -> list[str]:
    rows: dict[str, int] = {}
    for name in experiments:
        paper = name.partition("/")[0]
        rows[paper] = rows.get(paper, 0) + 1
    lines = ["experiment=PAPER/ROW, by paper:", *_table((paper, f"{n} rows") for paper, n in rows.items())]
    return [*lines, "", "--help experiment=PAPER lists the rows of a paper."]


def _rows(paper: str, experiments: Iterable[str]) -> list[str]:
    names = [name for name in experiments if name.startswith(f"{paper}/")]
    return [f"experiment={paper}/ROW:", *_table((name, _header("experiment", name)) for name in names)]


def _class(group: str, name: str) -> list[str]:
    key, find = CLASSES[group]
    op = find()[name]
    paragraphs = [textwrap.fill(" ".join(part.split()), WIDTH) for part in op.description.split("\n\n")]
    arguments = list_arguments(op, OP_GIVEN)
    example = arguments[0] if arguments else None
    lines = [f"{key}={name}: {_module_summary(op)}", "", *"\n\n".join(paragraphs).splitlines(), ""]
    if group == "gates":
        places = _table((f"at={place}", text) for place, text in list_gate_places().items())
        lines += ["Place in the net, given like an argument; by default that of its paper:", *places, ""]
    if example is None:
        return [*lines, "It takes no arguments."]
    usage = f"{key}='{{name: {name}, {example.name}: ...}}'"
    lines += [f"Arguments, as in {usage}:", *_arguments(arguments)]
    options = list_softmax_options(op)
    return [*lines, "", "Options of its softmax, given like the arguments:", *_arguments(options)] if options else lines


def _module_summary(op: Class) -> str:
    lines = [line for line in op.path.read_text(encoding="utf-8").splitlines() if line.startswith('"""')]
    return lines[0].strip('"') if lines else ""


def _net(model: str) -> list[str]:
    """Return the lines on the arguments of a model's constructor, that of its first size."""
    config = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    sizes = config.get("sizes") or {}
    classes: dict[str, str] = {}
    lines: list[str] = []
    for size, entry in sizes.items():
        net = find_net(entry["name"])
        if net is None or net.node.name in classes:
            continue
        classes[net.node.name] = size
        lines += ["", f"Arguments of {net.node.name} ({entry['name']}), as in +model.args.NAME=VALUE:"]
        lines += _arguments(list_arguments(net, NET_GIVEN))
    return lines


def _arguments(arguments: Iterable[Argument]) -> list[str]:
    return _table(
        (f"{argument.name}={argument.default}" if argument.default else argument.name, argument.meaning)
        for argument in arguments
    )


def _keys(group: str, choice: str) -> list[str]:
    """Return a choice's yaml with its comments, followed by the files that it inherits from."""
    text = (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if not re.match(r"# @package|\s*_target_:", line)]
    lines = [f"{group}={choice}", "", *_wrapped(_with_meanings(shown, group, choice))]
    defaults = (yaml.safe_load(text) or {}).get("defaults", [])
    for default in defaults:
        if isinstance(default, str) and (CONF / group / f"{default}.yaml").is_file():
            lines += ["", f"It inherits from {default}:", *_keys(group, default)]
    return lines


def _task_of(group: str, choice: str) -> str:
    """Return the task that a choice is for, as its yaml or a yaml that it inherits from says; else classification."""
    if group not in ("data", "recipe", "method"):
        return choice if group == "task" else "classification"
    config = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8")) or {}
    task = (config.get("data") or {}).get("task") or config.get("task")
    parents = [name for name in config.get("defaults", []) if isinstance(name, str) and name != "_self_"]
    return task or (_task_of(group, parents[0]) if parents else "classification")


def _with_meanings(lines: Iterable[str], group: str, choice: str) -> Iterator[str]:
    """Yield yaml lines; a key without a comment of its own gets its meaning from the schema as its comment."""
    task = _task_of(group, choice)
    # Indentation and name of each key that the line is below.
    above: list[tuple[int, str]] = []
    for line in lines:
        key = re.match(r"( *)(\w+):(?! \{)", line)
        if key is None:
            yield line
            continue
        above = [(indent, name) for indent, name in above if indent < len(key[1])] + [(len(key[1]), key[2])]
        name = ".".join(name for _, name in above)
        if group == "probe":
            text = meaning(f"probe.{name}", "probe", probe=choice)
        elif group == "panel":
            text = meaning(f"panel.{name}", "eval")
        else:
            text = meaning(name if group == "data" else f"{group}.{name}", "train", task)
        yield f"{line} # {text}" if text and " # " not in line else line


def _own_keys(program: str) -> list[tuple[str, str]]:
    """Return the keys that belong to no group, such as `seed` and `checkpoint.every_steps`, with their meanings."""
    names = [name for name in PROGRAMS[program].model_fields if not (CONF / name).is_dir() and name != "run_dir"]
    sections = {"ops": Ops, "checkpoint": Checkpoint}
    keys = [f"{name}.{key}" for name in names if name in sections for key in sections[name].model_fields]
    return [(key, meaning(key, program) or "") for key in [*(name for name in names if name not in sections), *keys]]


def _wrapped(lines: Iterable[str]) -> list[str]:
    """Return yaml lines at most as wide as the help: a trailing comment that does not fit goes before its key."""
    wrapped: list[str] = []
    for is_comment, block in itertools.groupby(lines, key=lambda line: line.lstrip().startswith("#")):
        block = list(block)
        if is_comment:
            wrapped += _comment(block)
            continue
        for line in block:
            code, mark, comment = line.partition(" # ")
            if mark and len(line) > WIDTH:
                indent = " " * (len(line) - len(line.lstrip()))
                wrapped += [*_comment([f"{indent}# {comment}"]), code]
            else:
                wrapped.append(line)
    return wrapped


def _comment(lines: Sequence[str]) -> list[str]:
    """Return comment lines as they are if they fit, else as one wrapped paragraph."""
    if max(map(len, lines)) <= WIDTH:
        return list(lines)
    mark = lines[0][: lines[0].index("#")] + "# "
    text = " ".join(line.lstrip("# ") for line in lines)
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=mark)


def _header(group: str, choice: str) -> str:
    """Return the first sentence of the comment that opens a choice's yaml; for an experiment the whole comment."""
    comment: list[str] = []
    for line in (CONF / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if text.startswith(("@package", "Generated by")):
            continue
        if text.startswith("python "):
            break
        comment.append(text)
    text = " ".join(comment)
    return text if group == "experiment" else re.split(r"[.;] ", text, maxsplit=1)[0].rstrip(".")


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return rows of two columns: a name, and a text that is wrapped; a long name stands on a line of its own."""
    rows = list(rows)
    width = min(max((len(name) for name, _ in rows), default=0), 26)
    lines: list[str] = []
    for name, text in rows:
        indent = " " * (width + 4)
        wrapped = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent) or [""]
        if len(name) <= width:
            lines.append(f"  {name:{width}}  {wrapped[0].lstrip()}".rstrip())
            lines += wrapped[1:]
        else:
            lines += [f"  {name}", *(line for line in wrapped if line)]
    return lines
