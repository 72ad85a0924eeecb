"""The schema of the composed configs of the programs: the type, the range and the meaning of every key.

`check_values` refuses a config with a wrong value before anything is written, and `--help` shows the meanings. The
sections are in `retinue.runs.schema_sections` and `schema_tasks`. Keys that only one class knows are checked by that
class: those of one data set, of a net or of a head, and further arguments of an optimiser, a logger or a callback.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from omegaconf import OmegaConf
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from retinue.runs.schema_messages import Expected, one_line, refuse_choice, without_null
from retinue.runs.schema_methods import Method
from retinue.runs.schema_nets import Head, Model
from retinue.runs.schema_panels import Panel
from retinue.runs.schema_probes import PROBES, Probe
from retinue.runs.schema_sections import (
    ClassificationData,
    ClassificationRecipe,
    Count,
    DenseData,
    DenseRecipe,
    DetectionData,
    Keys,
    MultiLabelRecipe,
    PathText,
    Positive,
    PretrainingRecipe,
    ShareBelowOne,
    Trainer,
    WholeNumber,
)
from retinue.runs.schema_tasks import (
    BossNASTask,
    ClassificationTask,
    DetectionTask,
    HashingTask,
    MultiLabelTask,
    PanopticTask,
    PretrainingTask,
    SegmentationTask,
    SupernetTask,
)
from retinue.utils.paths import CONF, list_group
from retinue.utils.tasks import CLASSIFIERS, TAKES_FROM_CLASSIFICATION

MAX_SEED = 2**32 - 1


class Checkpoint(Keys):
    """`checkpoint`."""

    every_minutes: Positive | None = Field(description="minutes between two checkpoints in an epoch; null: no limit")
    every_steps: Count | None = Field(description="steps between two checkpoints in an epoch; null: no limit")
    top_k: Count | None = Field(
        None, description="number of best epochs whose checkpoints are kept; null: the best one"
    )


class Ops(Keys):
    """`ops`."""

    backend: Literal["auto", "torch", "triton"] = Field(
        description="triton: kernels, or an error; torch: none; auto: where they can run"
    )


class Object(Keys):
    """A logger or a callback; Hydra passes the further keys to the class or function that is named."""

    target: Annotated[str, Field(min_length=1)] = Field(alias="_target_")


Objects = Annotated[dict[str, Object], Expected("a mapping of names to mappings with _target_")]


class Common(Keys):
    """Keys of the configs of all programs."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = Field(description="all random numbers follow from this one")
    weights: PathText | None = Field(description="weights file: a released one, or a checkpoint of ours")
    ops: Ops
    run_dir: PathText
    trainer: Trainer


def _heads(task: str) -> str:
    paths = [path for path in sorted((CONF / "head").glob("*.yaml")) if path.stem in list_group("head")]
    heads = [path.stem for path in paths if yaml.safe_load(path.read_text(encoding="utf-8"))["task"] == task]
    return f", which has {', '.join(heads)}" if heads else ", which takes none"


class Training(Common):
    """Keys of train.py alone."""

    drop_classifier: bool = Field(description="with weights: leave out their classifier if it is of another width")
    classifier_map: PathText | None = Field(
        None,
        description="with weights: what their classes are (imagenet22k), or a file of rows",
    )
    rerun: bool = Field(description="train a finished run anew")
    checkpoint: Checkpoint = Field(description="in addition to the checkpoint at the end of every epoch")
    logger: Objects
    callbacks: Objects

    @model_validator(mode="after")
    def _clips_whole_weights(self) -> Self:
        if self.trainer.strategy == "fsdp" and self.recipe.clip_mode == "agc":  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                "trainer.strategy=fsdp has no recipe.clip_mode=agc, which needs whole weights: recipe.clip_mode=null "
                "clips by the norm of all gradients, or trainer.strategy=ddp"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _takes_rows_of_a_classifier(cls, values: Any) -> Any:
        if values.get("classifier_map") is None:
            return values
        task = values["task"]["name"]
        if task == "pretraining" or task not in CLASSIFIERS:
            raise ValueError(f"classifier_map is for tasks with a classifier, not for task={task}")
        if values.get("weights") is None:
            raise ValueError("classifier_map takes rows of the classifier in weights=FILE, which is missing")
        if values.get("drop_classifier"):
            raise ValueError("drop_classifier=true leaves out the classifier that classifier_map takes rows of")
        return values

    @model_validator(mode="after")
    def _has_graphs_on_one_device_for_one_size(self) -> Self:
        several = self.trainer.devices * self.trainer.num_nodes > 1
        if several and self.task.compile == "reduce-overhead":  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("task.compile=reduce-overhead is for one device: task.compile=true compiles for several")
        sizes = getattr(self.recipe.augment, "sizes", None)  # pyright: ignore[reportAttributeAccessIssue]
        if self.task.compile == "reduce-overhead" and sizes is not None:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("task.compile=reduce-overhead is for one image size: task.compile=true takes several")
        return self


class Inference(Common):
    """Keys that eval.py and predict.py have in common."""

    run: PathText | None = Field(
        None, description="folder of a run, for its config and its best weights; other keys win over it"
    )
    batch_size: Count | None = Field(description="images in a batch of one device; null: task.eval_batch")


class Evaluation(Inference):
    """Keys of eval.py alone."""

    save_images: WholeNumber = Field(
        description="number of pictures of predictions beside the truth, for detection and segmentation"
    )
    save_predictions: bool = Field(
        description="true: write the prediction of each test image: probabilities, or maps; detections always are"
    )
    save_maps: bool = Field(description="the same as save_predictions, for segmentation and panoptic")
    calibrate: bool = Field(description="true: add figures after temperature scaling, for classification")
    panel: Panel | None = Field(None, description="further test sets, for classification; null: none")


class Prediction(Inference):
    """Keys of predict.py alone."""

    images: PathText | None = Field(description="needed: folder of images, pattern such as 'photos/**/*.jpg', or file")
    save: PathText | None = Field(description="folder for the predictions; null: one in the run's folder or outputs")
    pictures: bool = Field(description="true: draw a picture of each image with its prediction")


class Probing(Inference):
    """Keys of probe.py alone."""

    probe: Probe
    feature: Literal["head", "class_token", "mean", "map", "tokens"] | None = Field(
        description="part of the net's output; null: head, what its classifier reads, and map for probe=attentive"
    )
    holdout: ShareBelowOne = Field(description="share of the training images by which a probe's settings are chosen")
    cache: PathText | None = Field(description="folder that keeps the features; null: they are not kept")


# Keys of `recipe.augment` and the tasks that take them; the other keys are for every task that has them.
AUGMENTS = {
    "jsd": ("classification", "supernet"),
    "maskmix": ("classification", "supernet", "multi_label"),
    "sizes": ("classification", "supernet", "multi_label", "hashing", "detection", "segmentation", "panoptic"),
}


class Sections(Keys):
    """Sections whose keys are the same for all tasks."""

    model: Model
    head: Head

    @model_validator(mode="before")
    @classmethod
    def _belongs_to_one_task(cls, values: Any) -> Any:
        """Refuse data, a head and a recipe of another task; each has a key `task`, which a recipe may lack."""
        task = values["task"]["name"]
        if "method" in values and task != "pretraining":
            raise ValueError(f"method is for task=pretraining, not task={task}")
        for group in ("data", "head", "recipe"):
            section = values.get(group)
            if not isinstance(section, Mapping):
                raise ValueError(refuse_choice(group, "null"))
            other = section.get("task", task)
            shared = other == "classification" and group in TAKES_FROM_CLASSIFICATION.get(task, ())
            if other != task and not shared:
                subject = "this recipe" if group == "recipe" else f"{group}={section.get('name')}"
                hint = {"head": _heads(task), "recipe": ", which has its own"}.get(group, "")
                raise ValueError(f"{subject} is for task={other}, not task={task}{hint}")
        augment = values["recipe"].get("augment")
        for key, tasks in AUGMENTS.items():
            if isinstance(augment, Mapping) and augment.get(key) and task not in tasks:
                raise ValueError(f"recipe.augment.{key} is for task={' or '.join(tasks)}, not task={task}")
        return values


class Classification(Sections):
    """Sections of classification."""

    task: ClassificationTask
    data: ClassificationData
    recipe: ClassificationRecipe


class MultiLabel(Sections):
    """Sections of multi-label classification."""

    task: MultiLabelTask
    data: ClassificationData
    recipe: MultiLabelRecipe


class Hashing(Classification):
    """Sections of hashing, those of classification but for the task."""

    task: HashingTask  # pyright: ignore[reportIncompatibleVariableOverride]


class Supernet(Classification):
    """Sections of supernets."""

    task: SupernetTask  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _has_whole_weights(self) -> Self:
        if self.trainer.strategy == "fsdp":  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("task=supernet sorts weights, which trainer.strategy=fsdp shards: trainer.strategy=ddp")
        return self


class BossNAS(Classification):
    """Sections of BossNAS's supernets."""

    task: BossNASTask  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _has_one_device(self) -> Self:
        if self.trainer.devices * self.trainer.num_nodes > 1:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("task=bossnas keeps the views of an image together on one device: trainer.devices=1")
        return self

    @model_validator(mode="after")
    def _has_whole_batches_of_views(self) -> Self:
        if isinstance(self, Training):
            views, parts = self.recipe.augment.repeats, self.trainer.accumulate_grad_batches
            if self.recipe.batch_size % (views * parts) or self.recipe.batch_size == views * parts:
                raise ValueError(
                    f"a batch of task=bossnas has all {views} views of two images or more: recipe.batch_size="
                    f"{self.recipe.batch_size} must be a multiple of {views * parts}, and above it"
                )
        return self


class Detection(Sections):
    """Sections of detection."""

    task: DetectionTask
    data: DetectionData
    recipe: DenseRecipe


class Segmentation(Sections):
    """Sections of segmentation."""

    task: SegmentationTask
    data: DenseData
    recipe: DenseRecipe


class Panoptic(Sections):
    """Sections of panoptic segmentation."""

    task: PanopticTask
    data: DenseData
    recipe: DenseRecipe


class Pretraining(Sections):
    """Sections of pretraining."""

    task: PretrainingTask
    data: ClassificationData
    method: Method
    recipe: PretrainingRecipe

    @model_validator(mode="after")
    def _samples_evenly(self) -> Self:
        if self.data.sampler is not None:
            raise ValueError("task=pretraining uses no labels, so data.sampler must be null")
        return self


PROGRAMS: dict[str, type[Common]] = {
    "train": Training, "eval": Evaluation, "predict": Prediction, "probe": Probing,
}  # fmt: skip
TASKS: dict[str, type[Sections]] = {
    "classification": Classification, "multi_label": MultiLabel, "detection": Detection, "segmentation": Segmentation,
    "panoptic": Panoptic, "hashing": Hashing, "supernet": Supernet, "bossnas": BossNAS,
    "pretraining": Pretraining,
}  # fmt: skip
# Keys whose interpolations Hydra resolves only in the run itself.
IN_THE_RUN = ("run_dir", "logger", "callbacks")


def schema(program: str, task: str, probe: str | None = None) -> type[BaseModel]:
    """Return the schema of the configs of a program (`train`, `eval`, `predict` or `probe`) for a task and a probe."""
    return create_model(f"{program}_{task}", __base__=(_of_program(program, probe), TASKS[task]))


def _of_program(program: str, probe: str | None) -> type[Common]:
    """Return the schema of a program's own keys, with the keys of the probe if one is named."""
    own = PROGRAMS[program]
    return own if probe is None else create_model(f"{program}_{probe}", __base__=own, probe=(PROBES[probe], ...))


def program_of(cfg: Mapping) -> str:
    """Return the program that a composed config is for."""
    keys = {"images": "predict", "save_images": "eval", "probe": "probe"}
    return next((program for key, program in keys.items() if key in cfg), "train")


def check_values(cfg: Any) -> None:
    """Refuse a composed config with a value of the wrong type or out of its range.

    Args:
        cfg: The config of a program; also while Hydra composes it.

    Raises:
        ValueError: One line with the key, what is expected, the value, and the nearest choice.
    """
    values = {key: _plain(cfg, key) for key in cfg if key != "hydra"}
    program = program_of(values)
    probe = values["probe"].get("name") if isinstance(values.get("probe"), Mapping) else None
    if program == "probe" and probe not in PROBES:
        raise ValueError(refuse_choice("probe", "null" if probe is None else repr(probe)))
    if values.get("run") is not None:
        # The sections are those of the run's config, which is merged with this one and then checked.
        expected = _of_program(program, probe)
    else:
        name = values["task"].get("name") if isinstance(values.get("task"), Mapping) else None
        if name not in TASKS:
            raise ValueError(refuse_choice("task", "null" if name is None else repr(name)))
        expected = schema(program, name, probe)
    try:
        expected.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_line(error, expected, values)) from None


def _plain(cfg: Any, key: Any) -> Any:
    """Return a key's value as plain Python, with its interpolations resolved except for the keys of `IN_THE_RUN`."""
    node = cfg._get_node(key)
    if key in IN_THE_RUN:
        return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node._value()
    value = cfg[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def meaning(key: str, program: str = "train", task: str = "classification", probe: str | None = None) -> str | None:
    """Return the meaning of a dotted key, such as `recipe.optimizer.lr`; None for a key that the schema lacks."""
    model: Any = schema(program, task, probe)
    field = None
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields):
            return None
        field = model.model_fields[part]
        model = without_null(field.annotation)
    return None if field is None else field.description
