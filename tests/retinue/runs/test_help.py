"""`--help` fits on one screen, answers questions about every choice, and needs no torch."""

import itertools
import os
import re
import signal
import subprocess
import sys

import pytest
from pydantic import BaseModel

from models.reduction import list_reductions
from ops import list_gates, list_ops
from retinue.results.experiments import experiments
from retinue.runs import schema, schema_probes, schema_sections, schema_tasks
from retinue.runs.help import GROUPS, GROUPS_OF, OP_GIVEN, list_choices
from retinue.runs.signatures import find_net, find_ops, find_reductions, list_arguments
from retinue.utils.paths import CONF, PROJECT

SCREEN = 40  # lines


@pytest.mark.parametrize("program", ["train", "eval", "predict", "probe"])
def test_the_overview_is_one_screen(cli, program):
    lines = cli(program, "--help").out.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    groups = [group for group in GROUPS if GROUPS_OF.get(group, program) == program]
    assert f"Usage: python {program}.py" in text and all(group in text for group in groups)
    assert "task                9   --help task" in text or program == "probe"
    assert f"{len(list_choices('model'))}   --help model" in text


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_choices(cli, program, group):
    outcome = cli(program, "--help", group)
    assert outcome.code == 0, outcome.err
    names = {line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ") and line.strip()}
    papers = {name.partition("/")[0] for name in list_choices(group)}
    assert names >= (papers if group == "experiment" else set(list_choices(group)))
    assert max(map(len, outcome.out.splitlines())) <= 100
    assert "default_" not in outcome.out


def test_every_op_is_listed_with_its_first_line_and_shown_with_its_arguments(cli):
    assert list_choices("ops") == list_ops()
    text = cli("train", "--help", "ops=window").out
    assert "window=7" in text and "Side of a window" in text and "model.mixers=" in text
    assert "temperature='fixed'" in text and "number of keys" in text
    assert "temperature='fixed'" not in cli("train", "--help", "ops=global_query").out
    for name, op in find_ops().items():
        assert op.summary, name
        outcome = cli("train", "--help", f"ops={name}")
        assert outcome.code == 0
        for argument in list_arguments(op, OP_GIVEN):
            assert argument.meaning and f"  {argument.name}" in outcome.out, (name, argument)


def test_every_gate_is_listed_and_shows_its_arguments_and_places(cli):
    assert list_choices("gates") == list_gates()
    text = cli("train", "--help", "gates=ela").out
    assert all(words in text for words in ("model.gates=ela", "form='base'", "ELA-B", "at=branch", "at=stage"))
    assert "rd_ratio=1.0 / 16" in cli("train", "--help", "gates=se").out


def test_every_reduction_is_listed_and_shows_its_arguments(cli):
    assert list_choices("reduction") == list_reductions()
    assert all(words in cli("train", "--help", "reduction=tome").out for words in ("model.reduction=tome", "keep=0.5"))
    for name, reduction in find_reductions().items():
        assert "model.reduction=" in cli("train", "--help", f"reduction={name}").out
        arguments = list_arguments(reduction, OP_GIVEN)
        assert arguments and all(argument.meaning and argument.default for argument in arguments)


def test_a_model_shows_its_sizes_names_and_arguments(cli):
    text = cli("train", "--help", "model=swin").out
    for words in ("size: null", "name: swin_tiny", "drop_path_rate: 0.3", "recipe: swin", "mixers: null",
                  "dim=96", "window=7", "Side of a window", "depths=(2, 2, 6, 2)"):  # fmt: skip
        assert words in text, words
    assert "cfg" in cli("train", "--help", "model=maxvit").out  # a net of timm
    for name in ("biformer_tiny", "agent_cswin_base", "gc_vit_tiny", "efficientvit_m0", "resnet50.a1_in1k"):
        assert find_net(name) is not None, name


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("data=imagenet", ("root: null", "synsets: folder", "crop_pct: 0.875")),
        ("data=digits", ("It inherits from default_classification", "mean: [0.309, 0.309, 0.309]")),
        ("head=upernet", ("UPerNet", "auxiliary_head", "recipe: ade20k_160k")),
        ("recipe=swin", ("clip_grad: 5.0", "It inherits from deit", "erasing_mode: pixel")),
        ("task=segmentation", ("mode: whole", "stride: [341, 341]")),
        ("hydra/launcher=slurm", ("timeout_min: 1440",)),
        ("experiment=swin/tiny_in1k", ("Swin-T on ImageNet-1k", "override /model: swin")),
    ],
)
def test_a_choice_shows_its_keys_with_their_comments(cli, topic, words):
    outcome = cli("eval", topic, "--help")
    assert outcome.code == 0 and all(word in outcome.out for word in words), outcome
    assert "@package" not in outcome.out and " _target_:" not in outcome.out


def test_every_yaml_of_every_group_can_be_shown(cli):
    for group in GROUPS:
        if group not in ("ops", "experiment"):
            for path in (CONF / group).glob("*.yaml"):
                assert cli("train", "--help", f"{group}={path.stem}").code == 0


def test_a_paper_lists_its_rows(cli):
    text = " ".join(cli("train", "--help", "experiment=swin").out.split())
    for name in experiments("swin"):
        assert f"{name} " in text
    assert "swin/tiny_in1k Swin-T on ImageNet-1k at 224 px: 28 M parameters, 4.5 GMACs, top-1 81.2 %" in text
    assert "biformer/" not in text


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("modl", "there is no group 'modl'. Did you mean 'model'?"),
        ("model=swn", "model=swn is not there. Did you mean 'swin'?"),
        ("ops=agnt", "ops=agnt is not there. Did you mean 'agent'?"),
        ("experiment=biformr", "experiment=biformr is not there. Did you mean 'biformer'?"),
        ("experiment=swin/tiny_in1", "experiment=swin/tiny_in1 is not there. Did you mean 'swin/tiny_in1k'?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(cli, program, topic, message):
    assert message in cli(program, "--help", topic).error


@pytest.mark.parametrize("topic", [(), ("model=swin",), ("ops=agent",), ("experiment=swin",)])
def test_help_imports_no_torch_and_is_quick(topic):
    code = (
        f"import sys, runpy; sys.argv = ['train.py', '--help', *{topic!r}]; "
        "runpy.run_path('train.py', run_name='__main__'); print('torch' in sys.modules)"
    )
    before = os.times().children_user
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
    assert os.times().children_user - before < 1  # seconds of processor time


@pytest.mark.parametrize(
    "command", [["train.py", "--help"], ["train.py", "--help", "ops"], ["scripts/collect.py", "--help"]]
)
def test_a_closed_pipe_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, *command], cwd=PROJECT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert run.stderr == ""
    # The code of any program whose reader has gone; argparse itself ignores that.
    assert run.returncode in (128 + signal.SIGPIPE, 0)


def test_another_broken_pipe_keeps_its_traceback():
    code = "from retinue.utils.errors import user_errors\nwith user_errors():\n    raise BrokenPipeError('a worker')"
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 1 and "BrokenPipeError: a worker" in run.stderr


@pytest.mark.parametrize(
    "topic",
    ["trainer=auto", "task=classification", "task=detection", "task=segmentation", "recipe=deit", "recipe=coco_1x",
     "recipe=ade20k_160k", "data=imagenet", "data=voc", "data=ade20k", "probe=attentive", "probe=ood"],
)  # fmt: skip
def test_every_key_of_a_choice_has_a_meaning(cli, topic):
    lines = cli("train", "--help", topic).out.partition("It inherits from")[0].splitlines()
    keys = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r" *\w+:(?! \{)", line) and " # " not in line and not before.lstrip().startswith("# ")
    ]
    # Labels of the choice itself, and sections whose keys follow, explain themselves.
    labels = {"task", "name", "optimizer", "distillation", "data", "defaults"}
    unexplained = [line for line in keys if line.strip().partition(":")[0] not in labels]
    # The keys of `own` have the meanings of the keys of the same names above them.
    explained = {line.strip().partition(":")[0] for line in lines if re.match(r"  \w+:.* # ", line)}
    if "  own: # the data's own values" in lines:
        unexplained = [line for line in unexplained if line.strip().partition(":")[0] not in explained]
    assert unexplained == []


def test_the_meanings_of_keys_without_a_group_are_in_the_overview(cli):
    train, evaluation = cli("train", "--help").out, cli("eval", "--help").out
    assert "  rerun                     train a finished run anew" in train and "checkpoint.every_steps" in train
    assert "  save_images " in evaluation and "  batch_size " in evaluation and "rerun" not in evaluation


@pytest.mark.parametrize("group", ["data", "recipe", "task", "trainer", "head", "probe"])
def test_no_yaml_repeats_the_schemas_meaning_of_a_key(group):
    sections = [
        section
        for module in (schema, schema_sections, schema_tasks, schema_probes)
        for section in vars(module).values()
    ]
    sections = [section for section in sections if isinstance(section, type) and issubclass(section, BaseModel)]
    meanings = {field.description for section in sections for field in section.model_fields.values()} - {None}
    assert len(meanings) > 80
    repeated = [
        f"{path.name}: {line.strip()}"
        for path in (CONF / group).glob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.partition(" # ")[2] in meanings
    ]
    assert repeated == []
