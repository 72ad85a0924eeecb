"""Sections of the config's schema (`retinue.runs.schema`): the type, the range and the meaning of each key.

Numbers are finite, a number is no text, and null stands only where the type permits it. This module needs no torch.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from datamodules.corruption_levels import NAMES as CORRUPTIONS
from retinue.runs.schema_messages import Expected
from retinue.utils.command_line import to_text


def _is_whole_or_share(value: float) -> float:
    if value < 1 if isinstance(value, int) else not 0 < value <= 1:
        raise ValueError
    return value


def _is_grey_or_colour(value: int) -> int:
    if value not in (1, 3):
        raise ValueError
    return value


def _is_corruption(value: str) -> str:
    if value not in CORRUPTIONS:
        raise ValueError
    return value


Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
# timm crops up to 1.15 of the resized image (VOLO); `datamodules.base` has the same bound.
CropShare = Annotated[float, Field(gt=0, le=1.2)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1), Expected("a name")]
PathText = Annotated[str, Field(min_length=1), Expected("a path")]
Section = Annotated[dict, Expected("a mapping")]
Batches = Annotated[
    int | float,
    AfterValidator(_is_whole_or_share),
    Expected("a number of batches, 1 or more, or a share above 0 and at most 1.0"),
]
Channels = Annotated[int, AfterValidator(_is_grey_or_colour), Expected("1 or 3")]
Pixels = Annotated[list[Count], Field(min_length=2, max_length=2), Expected("a pair of whole numbers, 1 or more")]
Sides = Annotated[Count | Pixels, Expected("a number of pixels, 1 or more, or a pair of these")]
LossWeights = Annotated[dict[str, NonNegative], Expected("a mapping of names to weights, 0 or more")]
ClassWeights = Annotated[
    Literal["balanced"] | dict[str | int, NonNegative],
    Expected("balanced, or a mapping of classes to weights, 0 or more"),
]
FrozenParts = Annotated[
    list[Annotated[str, Field(pattern=r"^(backbone|norms|stem|(stage|block)[1-9]\d*(-[1-9]\d*)?)$")]],
    Field(min_length=1),
    Expected("a list of backbone, norms, stem, stage1, block1, stage1-2 and the like"),
]
PixelLosses = Annotated[
    dict[str, Positive | dict[str, NonNegative]],
    Expected("a mapping of losses to weights above 0, or to mappings of weight and parameters"),
]
CorruptionName = Annotated[str, AfterValidator(_is_corruption), Expected(f"one of {', '.join(CORRUPTIONS)}")]
Pair = Annotated[list[Positive], Field(min_length=2, max_length=2), Expected("a pair of numbers above 0")]


class Keys(BaseModel):
    """Base class of the sections: values keep their types, and keys that a section does not list are not checked."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class Trainer(Keys):
    """`conf/trainer/*.yaml`: arguments of `pytorch_lightning.Trainer`."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(description="auto: a GPU if there is one")
    devices: Count = Field(description="devices of each machine, with one process each")
    num_nodes: Count = Field(description="machines")
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"] = Field(
        description="ddp: each device has the whole net; fsdp: nets are sharded over the devices"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="bf16 and fp16 are mixed precision")
    accumulate_grad_batches: Count = Field(
        description="batches in a step; each has recipe.batch_size / (devices * nodes * this) images"
    )
    limit_train_batches: Batches = Field(description="number, or share with a decimal point, of an epoch's batches")
    limit_val_batches: Batches = Field(description="the same for validation")
    log_every_n_steps: Count = Field(description="steps between two rows of metrics.csv")
    deterministic: bool | Literal["warn"] = Field(description="true: refuse operations that are not deterministic")
    sync_batchnorm: bool = Field(description="batch norm's statistics are those of all devices together")


class Optimizer(Keys):
    """`recipe.optimizer`; further keys are arguments of timm's optimisers."""

    name: Name = Field(description="adamw, lamb, sgd, muon or any other optimiser of timm")
    lr: Positive = Field(
        description="all learning rates are for lr_batch_size images a step; they scale linearly with batch_size"
    )
    lr_batch_size: Count = Field(description="images a step that the learning rates are for")
    lr_scaling: Literal["sqrt"] | None = Field(
        None, description="sqrt: they scale with the square root of batch_size; null: linearly"
    )
    weight_decay: NonNegative = Field(description="norms and biases have none")
    layer_decay: PositiveShare | None = Field(
        None, description="factor on the learning rate from each layer to the one below"
    )
    backbone_factor: NonNegative | None = Field(None, description="factor on the backbone's learning rate")
    momentum: ShareBelowOne | None = Field(None, description="share of the old step; null: the optimiser's default")
    betas: Annotated[list[ShareBelowOne], Field(min_length=2, max_length=3)] | None = Field(
        None, description="shares of the old averages of the gradient; null: the optimiser's default"
    )
    eps: NonNegative | None = Field(None, description="null: the optimiser's default, or it takes none")


class Schedule(Keys):
    """`recipe.schedule`."""

    kind: Literal["cosine", "step", "poly", "plateau"] = Field(
        description="step needs milestones (in epochs) and gamma; poly needs power; plateau needs patience and gamma"
    )
    warmup_epochs: NonNegative | None = Field(None, description="epochs in which the learning rate rises linearly")
    warmup_steps: WholeNumber | None = Field(None, description="steps in which the learning rate rises linearly")
    warmup_lr: NonNegative = Field(description="learning rate at the start")
    after_warmup: bool | None = Field(None, description="true: cosine and poly begin at the end of the warm-up")
    min_lr: NonNegative = Field(description="learning rate at the end")
    milestones: Annotated[list[NonNegative], Field(min_length=1)] | None = Field(
        None, description="epochs after which the learning rate is multiplied by gamma"
    )
    gamma: Positive | None = Field(None, description="factor of the learning rate at a milestone or a plateau")
    patience: WholeNumber | None = Field(
        None, description="validations without a better figure after which the next one is a plateau"
    )
    power: Positive | None = Field(None, description="exponent of the polynomial")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        for kind, key, example in (
            ("step", "milestones", "[8,11]"), ("step", "gamma", "0.1"), ("poly", "power", "0.9"),
            ("plateau", "patience", "5"), ("plateau", "gamma", "0.1"),
        ):  # fmt: skip
            if self.kind == kind and getattr(self, key) is None:
                name = f"recipe.schedule.{key}"
                raise ValueError(f"recipe.schedule.kind={kind} needs {name}, such as +{name}={example}")
        if self.kind == "plateau" and self.gamma is not None and self.gamma >= 1:
            raise ValueError(f"recipe.schedule.gamma must be below 1 with kind=plateau, not {self.gamma:g}")
        if self.warmup_epochs is None and self.warmup_steps is None:
            raise ValueError("recipe.schedule.warmup_epochs or warmup_steps must be a number (0: no warm-up), not null")
        return self


class Average(Keys):
    """`recipe.ema`."""

    decay: ShareBelowOne | None = Field(
        description="weight of the old average in the new one, each step; null: no average"
    )
    warmup: bool = Field(description="true: the average forgets the initial weights faster, for short runs")


class Recipe(Keys):
    """Keys that the recipes of all tasks have in common."""

    epochs: Count | None = Field(description="length of the training")
    steps: Count | None = Field(None, description="length in steps, instead of epochs")
    batch_size: Count = Field(description="images a step, over all devices and accumulated batches")
    reduced_from: Count | None = Field(
        None, description="batch size that a small training set has reduced, in recipes that permit this"
    )
    val_every: Count | None = Field(
        None, description="epochs from one validation to the next; the last epoch has one too; null: 1"
    )
    average_best: Annotated[int, Field(ge=2)] | None = Field(
        None, description="number of best checkpoints whose mean is tested; null: the best one is tested"
    )
    clip_grad: Positive | None = Field(description="maximum norm of the gradients; null: no clipping")
    clip_mode: Literal["agc"] | None = Field(
        None,
        description="agc: clip_grad is the largest ratio of the norms of an output's gradient and of its weights, "
        "such as 0.01",
    )
    freeze: FrozenParts | None = Field(
        None, description="parts of the net that stay as they are: [backbone], [norms], [stem,stage1], [stem,block1-8]"
    )
    optimizer: Optimizer
    schedule: Schedule = Field(description="by step")
    ema: Average = Field(description="average of the weights; if there is one, it is evaluated and saved")

    @model_validator(mode="after")
    def _clips_by_a_number(self) -> Self:
        if self.clip_mode is not None and self.clip_grad is None:
            raise ValueError(f"recipe.clip_mode={self.clip_mode} needs recipe.clip_grad, such as recipe.clip_grad=0.01")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            given = f"recipe.epochs={to_text(self.epochs)} and recipe.steps={to_text(self.steps)}"
            raise ValueError(f"a recipe has a number of epochs or of steps, and the other is null; not {given}")
        for unit, length in (("epochs", self.epochs), ("steps", self.steps)):
            warmup = getattr(self.schedule, f"warmup_{unit}")
            if length is not None and warmup is not None and warmup > length:
                raise ValueError(
                    f"recipe.schedule.warmup_{unit} must be at most recipe.{unit}, {length}, not {warmup:g}: the "
                    "training would end before its learning rate is reached"
                )
        return self


class MaskMix(Keys):
    """`recipe.augment.maskmix`; see `datamodules.mixing.MaskMix`."""

    alpha: Positive = Field(1.0, description="alpha of the beta distribution of the share of an image's own cells")
    cell: Count = Field(56, description="side of a cell in pixels")
    prob: Share = Field(0.5, description="probability that a batch is mixed in this way, not by MixUp or CutMix")


class ClassificationAugment(Keys):
    """`recipe.augment` for classification; see `datamodules.transforms.Augment`."""

    scale: Pair | None = Field(
        description="smallest and largest share of the image that a random crop takes; null: a random square"
    )
    ratio: Pair = Field(description="smallest and largest aspect ratio of this crop")
    pad_crop: WholeNumber = Field(description="pixels by which the image is padded before a random square is taken")
    interpolation: Literal["bilinear", "bicubic", "random"] = Field(description="how crops are resized; random: either")
    hflip: Share = Field(description="probability of mirroring horizontally")
    vflip: Share = Field(description="probability of mirroring vertically")
    auto_augment: Name | None = Field(
        description="timm's string: rand-m9-mstd0.5-inc1, original, v0, augmix-m3-w3, 3a, ..."
    )
    color_jitter: NonNegative = Field(description="strength of changes of brightness, contrast and saturation")
    repeats: Count = Field(description="copies of an image in the order of an epoch")
    erasing: Share = Field(description="probability of random erasing")
    erasing_mode: Literal["pixel", "rand", "const"] = Field(description="what erased pixels become, as in timm")
    mixup: NonNegative = Field(description="alpha of MixUp; 0: off")
    cutmix: NonNegative = Field(description="alpha of CutMix; 0: off")
    mixup_prob: Share = Field(description="probability that a batch is mixed")
    switch_prob: Share = Field(description="probability of CutMix if both are on")
    maskmix: MaskMix | None = Field(None, description="mix batches by MaskMix: {alpha, cell, prob}; null: off")
    jsd: NonNegative | None = Field(
        None, description="weight of the divergence of predictions for an image and two AugMix views; null: off"
    )
    label_smoothing: Share = Field(description="share of the target that is spread over all classes")
    device: Literal["gpu"] | None = Field(
        None, description="gpu: auto_augment and color_jitter change batches on the device that trains; null: the CPU"
    )
    sizes: Annotated[list[Sides], Field(min_length=1)] | None = Field(
        None, description="sizes of training images in pixels, in stages of equal length; null: data.image_size"
    )
    size_by: Literal["step"] | None = Field(None, description="step: each batch draws one of the sizes")
    decode: Literal["reduced"] | None = Field(
        None, description="reduced: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the crop permits"
    )


class DenseAugment(Keys):
    """`recipe.augment` for detection and segmentation; see `datamodules.dense_transforms.DenseAugment`."""

    sizes: list[Pixels] | None = Field(
        description="pairs [short, long], limits of the sides, one drawn for each image; null: the data's image_size"
    )
    ratio: Pair | None = Field(None, description="range of a random factor on this size")
    crop: Pixels | None = Field(None, description="height and width of a random crop; null: no crop")
    cat_max_ratio: PositiveShare | None = Field(None, description="maximum share of a crop that one class may cover")
    detr_crop: bool = Field(False, description="half of the images are resized and cropped as in DETR")
    hflip: Share = Field(description="probability of mirroring")
    photometric: bool = Field(description="change brightness, contrast, saturation and hue")


class ClassificationRecipe(Recipe):
    """`conf/recipe/*.yaml` for classification."""

    loss: Literal["ce", "bce"] = Field(description="ce: cross-entropy; bce: binary cross-entropy")
    bce_target_threshold: Share | None = Field(description="with bce: targets above this value count as 1")
    class_weights: ClassWeights | None = Field(
        None,
        description="balanced: 1 / (a class's share of the images); {CLASS: WEIGHT}: others have 1; null: all 1",
    )
    augment: ClassificationAugment = Field(description="augmentation; docs/data.md explains it")


class MultiLabelRecipe(ClassificationRecipe):
    """`conf/recipe/*.yaml` for multi-label classification, which takes the recipes of classification too."""

    loss: Literal["bce", "asl"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="bce: binary cross-entropy; asl: asymmetric loss, with the values of task.asl"
    )
    class_weights: Annotated[None, Expected("null for task=multi_label")] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="for classification only"
    )


class PretrainingRecipe(Recipe):
    """`conf/recipe/*.yaml` for pretraining."""

    augment: ClassificationAugment = Field(description="augmentation of each view; docs/pretraining.md explains it")

    @model_validator(mode="after")
    def _has_no_key_that_pretraining_ignores(self) -> Self:
        keys = {
            "freeze": self.freeze, "optimizer.layer_decay": self.optimizer.layer_decay,
            "augment.erasing": self.augment.erasing, "augment.mixup": self.augment.mixup,
            "augment.cutmix": self.augment.cutmix, "augment.label_smoothing": self.augment.label_smoothing,
        }  # fmt: skip
        for key, value in keys.items():
            if value:
                none = "null" if isinstance(value, list) or key == "optimizer.layer_decay" else 0
                raise ValueError(f"task=pretraining has no recipe.{key}: recipe.{key}={none}, not {to_text(value)}")
        return self


class DenseRecipe(Recipe):
    """`conf/recipe/*.yaml` for detection, segmentation and panoptic segmentation."""

    augment: DenseAugment = Field(description="augmentation; docs/data.md explains it")


class Data(Keys):
    """Keys that the data sets have in common. Null mean, deviation, crop and size are the data's or the net's own."""

    name: Name = Field(description="name of the data in a run's folder and in results")
    kind: Name = Field(description="small, imagenet, coco, ...: decides on the default recipe")
    root: PathText | None = Field(None, description="folder of the data")
    mean: Annotated[list[float], Field(min_length=1)] | None = Field(
        None, description="mean of each channel, for values from 0 to 1"
    )
    std: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        None, description="standard deviation of each channel, for values from 0 to 1"
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        description="loading processes per device; 0: this process loads; null: one per core, at most 16"
    )
    broken_limit: Share = Field(description="share of a split's images that may be unreadable before the run stops")
    sampler: Literal["repeat_factor"] | None = Field(
        None, description="repeat_factor: draw training images with rare classes more often; null: each once an epoch"
    )
    repeat_threshold: PositiveShare = Field(
        0.001, description="with repeat_factor: share of the images below which a class is rare"
    )


class Corruption(Keys):
    """`data.corrupt`; see `datamodules.corruptions`."""

    name: CorruptionName = Field(description="name of the corruption")
    severity: Annotated[int, Field(ge=1, le=5)] = Field(description="strength, 1 to 5")


class ClassificationData(Data):
    """`conf/data/*.yaml` for classification."""

    image_size: Sides | None = Field(None, description="side of the images in pixels, or [height, width]")
    sampler: Literal["repeat_factor", "balanced"] | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None,
        description="repeat_factor: draw training images with rare classes more often; balanced: draw all classes "
        "equally often; null: each image once an epoch",
    )
    in_chans: Count = Field(
        description="number of channels: 3, or 1 for grey; data=image_folder takes any number of bands"
    )
    crop_pct: CropShare | None = Field(None, description="share of the resized image that evaluation's crop keeps")
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        None, description="evaluation's crop as in timm: center, squash or border"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = Field(
        None, description="interpolation of evaluation's resizing"
    )
    flip: bool = Field(description="false: a mirrored image has another label, so hflip and vflip are not applied")
    shots: Count | None = Field(
        None, description="images of each class to train on, drawn by the seed; null: all images"
    )
    corrupt: Corruption | None = Field(
        None, description="corruption of the test images, such as {name: fog, severity: 3}; null: none"
    )


class DenseData(Data):
    """`conf/data/*.yaml` for detection, segmentation and panoptic segmentation."""

    image_size: Pixels | None = Field(
        None, description="[short, long], maximum of the shorter and of the longer side in pixels"
    )
    in_chans: Channels = Field(description="number of channels, always 3")
    keep_empty: bool = Field(False, description="true: train on images without objects too")
    flip: bool = Field(description="false: a mirrored object has another class, so hflip is not applied")


class DetectionData(DenseData):
    """`conf/data/*.yaml` for detection."""

    shots: Count | None = Field(
        None, description="objects of each class to train on, drawn by the seed; null: all objects"
    )
