"""Wrong values are one line with exit code 2, before anything is written or lost; the schema says what each key is."""

from typing import get_args

import pytest
import yaml
from omegaconf import OmegaConf

from datamodules.transforms import CROP_MODES, INTERPOLATIONS
from retinue.evaluation.segmentation import FIGURES
from retinue.runs.schema import check_values, schema
from retinue.runs.schema_sections import ClassificationData
from retinue.runs.schema_tasks import SegmentationTask
from retinue.tasks.optimization import SCHEDULES
from retinue.utils.paths import CONF, list_group
from tests.retinue.runs.test_config import composed

# Words of the message -> overrides of train.py.
TRAIN = {
    "seed must be a whole number from 0 to 4294967295, not": ["seed=-1", "seed=abc", "seed=1.5", "seed=null"],
    "weights must be a path or null, not": ["weights=5", "weights=[]"],
    "drop_classifier must be true or false, not 5": ["drop_classifier=5"],
    "rerun must be true or false, not 'no'. Did you mean 'false'?": ["rerun=no"],
    "rerun must be true or false, not 'maybe'": ["rerun=maybe"],
    "checkpoint.every_minutes must be a number above 0 or null, not": [
        "checkpoint.every_minutes=-1", "checkpoint.every_minutes=0",
    ],
    "checkpoint.every_steps must be a whole number, 1 or more, or null, not": [
        "checkpoint.every_steps=abc", "checkpoint.every_steps=0",
    ],
    "recipe.epochs must be a whole number, 1 or more, or null, not true": ["recipe.epochs=true"],
    "recipe.batch_size must be a whole number, 1 or more, not": [
        "recipe.batch_size=64.0", "recipe.batch_size=nan", "recipe.batch_size=null",
    ],
    "recipe.batch_size=100000 is more than the 1255 training images": ["recipe.batch_size=100000"],
    "recipe.clip_grad must be a number above 0 or null, not": ["recipe.clip_grad=abc", "recipe.clip_grad=-1"],
    "recipe.optimizer.lr must be a number above 0, not": [
        f"recipe.optimizer.lr={value}" for value in ("nan", "inf", "-1", "abc", "null")
    ],
    "recipe.optimizer.lr_batch_size must be a whole number, 1 or more, not 0": ["recipe.optimizer.lr_batch_size=0"],
    "recipe.optimizer.weight_decay must be a number, 0 or more, not -5": ["recipe.optimizer.weight_decay=-5"],
    "recipe.optimizer.layer_decay must be a number above 0 and at most 1 or null, not -2": [
        "recipe.optimizer.layer_decay=-2"
    ],
    "recipe.optimizer.eps must be a number, 0 or more, or null, not -1": ["recipe.optimizer.eps=-1"],
    "recipe.optimizer.betas must be a list of 2 to 3 entries, each a number from 0 to below 1, or null, not": [
        "recipe.optimizer.betas=[]", "recipe.optimizer.betas=[0.9,2]",
    ],
    "recipe.schedule.warmup_epochs must be a number, 0 or more, or null, not -2": ["recipe.schedule.warmup_epochs=-2"],
    "recipe.schedule.warmup_epochs must be at most recipe.epochs, 2, not 30": ["recipe.schedule.warmup_epochs=30"],
    "recipe.schedule.min_lr must be a number, 0 or more, not 'abc'": ["recipe.schedule.min_lr=abc"],
    "recipe.schedule.kind=step needs recipe.schedule.milestones": ["recipe.schedule.kind=step"],
    "recipe.ema.decay must be a number from 0 to below 1 or null, not": [
        "recipe.ema.decay=abc", "recipe.ema.decay=2", "recipe.ema.decay=-0.5",
    ],
    "recipe.augment.hflip must be a number from 0 to 1, not 7": ["recipe.augment.hflip=7"],
    "recipe.ema is missing": ["~recipe.ema"],
    "task.distillation.alpha must be a number from 0 to 1, not 7": ["task.distillation.alpha=7"],
    "task.compile must be true or false or reduce-overhead or auto, not 'maybe'": ["task.compile=maybe"],
    "task.figure must be top1 or top5, not 'top2'. Did you mean 'top": ["task.figure=top2"],
    "data.num_workers must be a whole number from 0 to 256 or null, not": [
        f"data.num_workers={value}" for value in ("-1", "abc", "1.5", "5000")
    ],
    "data.image_size must be a number of pixels, 1 or more, or a pair of these, or null, not": [
        "data.image_size=abc", "data.image_size=[32]", "data.image_size=0",
    ],
    "data.std must be a list of 1 or more entries, each a number above 0, or null, not": ["data.std=[0,1,1]"],
    "data.flip must be true or false, not 'off'. Did you mean 'false'?": ["data.flip=off"],
    "model.args must be a mapping or null, not 5": ["model.args=5"],
    "model.size must be a name or null, not 5": ["model.size=5"],
    "trainer.accumulate_grad_batches must be a whole number, 1 or more, not 0": ["trainer.accumulate_grad_batches=0"],
    "trainer.num_nodes must be a whole number, 1 or more, not 0": ["trainer.num_nodes=0"],
    "trainer.limit_val_batches must be a number of batches, 1 or more, or a share above 0 and at most 1.0, not 0": [
        "trainer.limit_val_batches=0"
    ],
    "trainer.limit_val_batches=0.0001 of 6 batches is less than one": ["trainer.limit_val_batches=0.0001"],
    "trainer.limit_train_batches must be a number of batches, 1 or more, or a share above 0 and at most 1.0, not": [
        f"trainer.limit_train_batches={value}" for value in ("-1", "2.5", "0")
    ],
    "trainer.log_every_n_steps must be a whole number, 1 or more, not": [
        "trainer.log_every_n_steps=0", "trainer.log_every_n_steps=-3",
    ],
    "trainer.accelerator must be one of auto, cpu, gpu, cuda, mps, not 'cpuu'. Did you mean 'cpu'?": [
        "trainer.accelerator=cpuu"
    ],
    "Did you mean 'ddp'?": ["trainer.strategy=dpp"],
    "trainer.precision=fp16 needs a GPU; a CPU takes fp32, or bf16 for mixed precision": ["trainer.precision=fp16"],
    "logger.tensorboard must be a mapping with the key _target_, not null": ["+logger.tensorboard=null"],
    "callbacks.mine must be a mapping with the key _target_, not 5": ["+callbacks.mine=5"],
    "run_dir must be a path, not null": ["run_dir=null"],
    "recipe must be one of ade20k_160k,": ["recipe=null"],
    "data must be one of ade20k,": ["data=null"],
    "model must be one of agent,": ["model=null"],
    "trainer must be one of auto, cpu, ddp, fsdp, gpu, not null": ["trainer=null"],
    "task must be one of bossnas, classification, detection, hashing, multi_label, panoptic, pretraining,": [
        "task=null"
    ],
    "logger must be one of mlflow, none, tensorboard, wandb, not null": ["logger=null"],
    "head must be one of att_swin_unet, cascade_mask_rcnn,": ["head=null"],
    "callbacks must be one of early_stopping, none, not null": ["callbacks=null"],
}  # fmt: skip

# Words of the message -> overrides of eval.py.
EVAL = {
    "batch_size must be a whole number, 1 or more, or null, not": ["batch_size=abc", "batch_size=0", "batch_size=8.0"],
    "save_images must be a whole number, 0 or more, not": ["save_images=-1", "save_images=abc"],
    "run must be a path or null, not []": ["run=[]"],
    "seed must be a whole number from 0 to 4294967295, not": ["seed=-1", "seed=abc"],
    "data.num_workers must be a whole number from 0 to 256 or null, not 5000": ["data.num_workers=5000"],
    "task.eval_batch must be a whole number, 1 or more, not 0": ["task.eval_batch=0"],
    "trainer.precision=fp16 needs a GPU": ["trainer.precision=fp16"],
    "model must be one of agent,": ["model=null"],
}

# Words of the message -> scripts with an option.
SCRIPTS = {
    "rounds must be greater than or equal to 1, not 0": [
        f"{name} rounds=0"
        for name in ("benchmark_ops", "benchmark_models", "benchmark_heads", "benchmark_trainer", "benchmark_pipeline",
                     "compare_ops")
    ],
    "threads must be greater than or equal to 1, not 0": [
        f"{name} threads=0" for name in ("benchmark_ops", "benchmark_models", "benchmark_heads", "benchmark_trainer")
    ],
    "trials must be greater than or equal to 1, not -3": ["search space=lr_wd trials=-3"],
    "max_size must be greater than 0, not": ["make_shards source=. out=shards max_size=-1"],
    "max_size must be a finite number, not": ["make_shards source=. out=shards max_size=nan",
                                              "make_shards source=. out=shards max_size=inf"],
    "batch_size must be greater than or equal to 1, not 0": ["reproduce paper=swin batch_size=0"],
    "recipe.epochs must be a whole number, 1 or more, or null, not true": ["search space=lr_wd recipe.epochs=true"],
    "trainer must be one of auto, cpu, ddp, fsdp, gpu, not null": ["search space=lr_wd trainer=null"],
}  # fmt: skip


def cases(words_of: dict[str, list[str]]) -> list:
    return [pytest.param(line, words, id=line) for words, lines in words_of.items() for line in lines]


@pytest.fixture
def run(cli):
    """Make a finished run, whose files no error may change, and return its folder."""
    files = {"result.json": '{"status": "finished", "metrics": {"test/top1": 0.5}}', "metrics.csv": "step\n1\n"}
    (cli.folder / "run/checkpoints").mkdir(parents=True)
    (cli.folder / "run/checkpoints/best.ckpt").touch()
    for name, text in files.items():
        (cli.folder / "run" / name).write_text(text)
    cfg = composed("model=swin", "model.size=nano", "logger=none")
    OmegaConf.save(cfg, cli.folder / "run/config.yaml", resolve=True)
    return cli.folder / "run"


def everything(folder) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("program", "line", "words"), [
    *(pytest.param("train", *case.values, id=f"train {case.id}") for case in cases(TRAIN)),
    *(pytest.param("eval", *case.values, id=f"eval {case.id}") for case in cases(EVAL)),
    *(pytest.param("script", *case.values, id=case.id) for case in cases(SCRIPTS)),
])  # fmt: skip
def test_a_wrong_value_is_one_line_and_nothing_is_written(cli, run, program, line, words):
    before = everything(cli.folder)
    if program == "train":
        outcome = cli.train(line)
    elif program == "eval":
        given = () if line.startswith(("run=", "model=")) else ("run=run",)
        outcome = cli("eval", "trainer=cpu", *given, line)
    else:
        name, *arguments = line.split()
        outcome = cli(f"scripts/{name}", *arguments)
    assert words in outcome.error
    assert everything(cli.folder) == before


@pytest.mark.parametrize(
    "line", ["recipe.optimizer.lr=nan", "trainer.precision=fp16", "recipe.batch_size=100000", "model.mixers=windw"]
)
def test_a_wrong_value_costs_no_finished_run(cli, run, line):
    before = everything(cli.folder)
    assert cli.train("hydra.run.dir=run", "rerun=true", line).error
    assert before.items() <= everything(cli.folder).items()


@pytest.mark.parametrize("key", ["seed", "task.eval_batch", "data.num_workers", "trainer.devices"])
def test_the_values_of_a_runs_config_are_checked_too(cli, run, key):
    cfg = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(cfg, key, "abc")
    OmegaConf.save(cfg, run / "config.yaml")
    before = everything(cli.folder)
    outcome = cli("eval", "run=run", "trainer=cpu")
    if key.startswith("trainer"):
        # The trainer is the command's, so the run's does not matter: the error is that the checkpoint is empty.
        assert "best.ckpt" in outcome.error
    else:
        assert f"{key} must be a whole number" in outcome.error
    assert everything(cli.folder) == before


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_every_key_of_the_common_sections_is_in_the_schema(program, task):
    cfg = composed(f"task={task}", program=program)
    check_values(cfg)
    expected = schema(program, task).model_fields
    assert set(cfg) - {"callbacks", "logger"} <= set(expected)
    for section in ("trainer", "recipe", "task", "ops", *(["checkpoint"] if program == "train" else [])):
        fields = set(expected[section].annotation.model_fields)  # pyright: ignore
        # A section's labels are compared with one another, and `_target_` is Hydra's.
        assert set(cfg[section]) - {"name", "task", "_target_"} <= fields


def test_the_recipe_of_every_head_fits_the_schema():
    heads = [yaml.safe_load((CONF / f"head/{head}.yaml").read_text()) | {"choice": head} for head in list_group("head")]
    data = {"detection": "coco", "segmentation": "ade20k", "panoptic": "coco_panoptic"}
    by_recipe = {head["recipe"]: head for head in heads if head.get("task") in data and "recipe" in head}
    assert {"coco_3x", "mask2former_160k", "mask2former_panoptic"} <= set(by_recipe)
    for head in by_recipe.values():
        check_values(composed(f"data={data[head['task']]}", f"head={head['choice']}"))


def test_the_choices_are_those_of_the_classes():
    def choices(model, name):
        annotation = model.model_fields[name].annotation
        return get_args(next((entry for entry in get_args(annotation) if get_args(entry)), annotation))

    assert choices(ClassificationData, "interpolation") == INTERPOLATIONS
    assert choices(ClassificationData, "crop_mode") == CROP_MODES
    assert get_args(SegmentationTask.model_fields["figure"].annotation) == (*FIGURES, "dice")
    schedule = schema("train", "detection").model_fields["recipe"].annotation.model_fields["schedule"].annotation  # pyright: ignore
    assert sorted(get_args(schedule.model_fields["kind"].annotation)) == sorted(SCHEDULES)
