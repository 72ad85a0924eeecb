"""Types, ranges and meanings of the keys of the section `task`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from retinue.runs.schema_sections import (
    Count,
    Keys,
    LossWeights,
    Name,
    NonNegative,
    Pair,
    PathText,
    PixelLosses,
    Pixels,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
    WholeNumber,
)


class Task(Keys):
    """Keys that the tasks have in common."""

    eval_batch: Count = Field(description="images in a batch of eval.py")
    compile: bool | Literal["auto"] = Field(
        description="compile the backbone by torch.compile; auto: on a GPU, if the training is long enough"
    )
    channels_last: bool = Field(description="keep images and the weights of convolutions in channels-last memory")
    grad_checkpointing: bool = Field(description="recompute blocks in the backward pass: less memory, more time")
    log_grad_norm: bool = Field(False, description="log the norm of the gradients, before clipping, as train/grad_norm")


FIGURE = "figure that chooses the best checkpoint (in validation) and that a sweep compares (in the test)"


class MapDistillation(Keys):
    """`task.distillation.maps`."""

    loss: Literal["mse", "normalised_mse", "cwd", "gram", "mgd"] | None = Field(
        None, description="loss between the student's maps and the teacher's; null: none. docs/distillation.md has them"
    )
    weight: NonNegative = Field(1.0, description="weight of the loss between maps")
    temperature: Positive = Field(1.0, description="cwd: divisor of the maps")
    masked: Share = Field(0.65, description="mgd: share of the student's places that are masked")
    student: list[WholeNumber] | None = Field(
        None, description="indices of the student's maps; null: the last map of each stride that both nets have"
    )
    teacher: list[WholeNumber] | None = Field(None, description="indices of the teacher's maps, as many")


class Distillation(Keys):
    """`task.distillation`."""

    teacher: Name | None = Field(
        description="name of a timm net, such as regnety_160.deit_in1k; null trains without a teacher"
    )
    weights: PathText | None = Field(description="weights file of the teacher; null takes timm's pretrained weights")
    mode: Literal["soft", "hard"] = Field(
        description="soft: KL divergence at `temperature`; hard: cross-entropy with the teacher's most likely class"
    )
    alpha: Share = Field(description="share of the teacher's part in the loss")
    temperature: Positive = Field(description="divisor of the logits in mode soft")
    tokens: NonNegative = Field(
        description="weight of the squared distance of the final tokens from those of the teacher, for ViT-shaped nets"
    )
    maps: MapDistillation = Field(
        MapDistillation(),  # pyright: ignore[reportCallIssue]
        description="loss between maps of the student and of the teacher",
    )


class DenseDistillation(Keys):
    """`task.distillation` of detection and segmentation."""

    teacher: PathText | None = Field(
        None, description="checkpoint of a run of the same task, RUN/checkpoints/best.ckpt; null: no teacher"
    )
    part: Literal["backbone", "neck"] = Field("neck", description="part of the two nets whose maps are compared")
    maps: MapDistillation = Field(
        MapDistillation(loss="cwd"),  # pyright: ignore[reportCallIssue]
        description="loss between maps of the student and of the teacher",
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.teacher and not self.maps.loss:
            raise ValueError("task.distillation.teacher needs task.distillation.maps.loss, such as cwd")
        return self


class SegmentorDistillation(DenseDistillation):
    """`task.distillation` of segmentation."""

    part: Literal["backbone", "neck", "logits"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "logits", description="part of the two nets whose maps are compared; logits: a score for each class"
    )


class TokenLabels(Keys):
    """`task.token_labels`."""

    source: PathText | None = Field(
        None, description="teacher (that of task.distillation), or a folder of stored label maps; null: no token labels"
    )
    weight: NonNegative = Field(0.5, description="weight of the tokens' loss")
    image_label: Literal["maps", "truth"] = Field(
        "maps", description="label of the image itself. maps: the mean over its tokens; truth: that of the data"
    )


class ClassificationTask(Task):
    """`conf/task/classification.yaml`."""

    compile: bool | Literal["reduce-overhead", "auto"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description="compile the net by torch.compile; auto: on a GPU, if the training is long enough; "
        "reduce-overhead: also replay its kernels as CUDA graphs, on one GPU"
    )
    figure: Literal["top1", "top5"] = Field(description=FIGURE)
    loss_weights: LossWeights = Field(
        {}, description="weights of the net's auxiliary losses by name; those not named are the paper's"
    )
    mixed_labels: Literal["transmix", "mixpro"] | None = Field(
        None, description="label mixed images by the class token's attention; null: by area"
    )
    token_labels: TokenLabels = Field(
        TokenLabels(),  # pyright: ignore[reportCallIssue]
        description="soft labels of the tokens; docs/augmentation.md explains them",
    )
    margin_loss: PositiveShare | None = Field(
        None, description="share of MultiGrain's margin loss in the loss, such as 0.5; null: none"
    )
    distillation: Distillation


class AsymmetricLoss(Keys):
    """`task.asl`."""

    gamma_positive: NonNegative = Field(description="with recipe.loss=asl: focusing exponent of positives")
    gamma_negative: NonNegative = Field(description="with recipe.loss=asl: focusing exponent of negatives")
    margin: ShareBelowOne = Field(description="with recipe.loss=asl: probability up to which a negative has no loss")


class MultiLabelTask(Task):
    """`conf/task/multi_label.yaml`."""

    figure: Literal["map", "f1_micro", "f1_macro"] = Field(description=FIGURE)
    loss_weights: LossWeights = Field(
        {}, description="weights of the net's auxiliary losses by name; those not named are the paper's"
    )
    asl: AsymmetricLoss = Field(description="asymmetric loss (arXiv:2009.14119)")


class HashingTeacher(Keys):
    """`task.teacher`; further keys are arguments of the net."""

    name: Name | None = Field(description="a ViT-shaped net such as deit_small, which learns too; null: no teacher")
    weights: PathText | None = Field(description="weights file that the teacher starts from; null: initial weights")


class HashingTask(Task):
    """`conf/task/hashing.yaml`."""

    figure: Literal["code_map", "top1", "top5"] = Field(description=FIGURE)
    bits: Count = Field(description="length of a code")
    class_weight: NonNegative = Field(description="weight of the cross-entropy")
    transfer_weight: NonNegative = Field(description="with a teacher: weight of the distance from its codes")
    masked_patches: Count = Field(description="with a teacher: number of its most important patches that are masked")
    loss_weights: LossWeights = Field(
        {}, description="weights of the net's auxiliary losses by name; those not named are the paper's"
    )
    teacher: HashingTeacher


class SupernetTask(ClassificationTask):
    """`conf/task/supernet.yaml`."""

    holdout: Count = Field(description="training images of each class that validate and that a search judges by")
    warmup_epochs: WholeNumber = Field(
        description="epochs in which the drawn sizes grow from the largest to all, and heads and channels are sorted"
    )


class BossNASTask(Task):
    """`conf/task/bossnas.yaml`."""

    figure: Literal["agreement"] = Field(description=FIGURE)
    holdout: Count = Field(description="training images of each class that validate and that paths are rated by")
    momentum: Share = Field(description="weight of the old average in the target's weights at the start; it rises to 1")


class DetectionInference(Keys):
    """`task.test` of detection."""

    scales: Annotated[list[Positive], Field(min_length=1)] = Field(
        [1.0], description="factors of the image's size; with several, the detections are merged"
    )
    flip: bool = Field(False, description="also detect in the mirror image")
    nms_iou: PositiveShare = Field(
        0.5, description="with several views: IoU from which the box with the lower score is removed"
    )
    max_per_image: Count = Field(100, description="with several views: maximum number of detections of an image")


class DetectionTask(Task):
    """`conf/task/detection.yaml`."""

    figure: Literal["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"] = Field(description=FIGURE)
    test: DetectionInference = Field(
        DetectionInference(),  # pyright: ignore[reportCallIssue]
        description="how images become detections in a test; docs/detection.md explains it",
    )
    distillation: DenseDistillation = Field(
        DenseDistillation(),  # pyright: ignore[reportCallIssue]
        description="learning from a trained detector; docs/distillation.md explains it",
    )


class PanopticTask(Task):
    """`conf/task/panoptic.yaml`."""

    figure: Literal["pq", "pq_things", "pq_stuff", "sq", "rq"] = Field(description=FIGURE)


class PretrainingTask(Task):
    """`conf/task/pretraining.yaml`."""

    figure: Literal["loss", "knn_top1", "probe_top1", "rankme"] = Field(description=FIGURE)
    bank: WholeNumber = Field(
        description="maximum number of training images that neighbours and a linear probe learn from; 0: neither"
    )


class Inference(Keys):
    """`task.test` of segmentation."""

    mode: Literal["whole", "slide"] = Field(
        description="whole: the net runs on the whole image; slide: on windows, whose logits are averaged"
    )
    crop: Pixels = Field(description="height and width of a window in pixels, in mode slide")
    stride: Pixels = Field(description="vertical and horizontal distance between windows in pixels, in mode slide")
    scales: Annotated[list[Positive], Field(min_length=1)] = Field(
        description="factors of the image's size; the papers' multi-scale test has 0.5, 0.75, ..., 1.75 with flip"
    )
    flip: bool = Field(description="also average over the mirror image")
    multiple: Count | None = Field(description="enlarge images to sides that are multiples of this number of pixels")


class SegmentationTask(Task):
    """`conf/task/segmentation.yaml`."""

    figure: Literal["miou", "pixel_accuracy", "mean_accuracy", "dice"] = Field(description=FIGURE)
    figures: Literal["medical"] | None = Field(
        None, description="medical: also Dice, HD95, IoU, sensitivity and specificity, as means over images"
    )
    spacing: Pair | None = Field(
        None, description="vertical and horizontal distance between the masks' pixels in mm, for HD95; null: in pixels"
    )
    losses: PixelLosses | None = Field(
        None,
        description="cross_entropy, focal, dice, tversky and boundary with their weights, as {cross_entropy: 1, "
        "tversky: {weight: 1, beta: 0.8}}; null: the head's own",
    )
    class_weights: Annotated[list[NonNegative], Field(min_length=1)] | None = Field(
        None, description="weight of each class in task.losses; null: all equal"
    )
    test: Inference = Field(description="how images become predictions; docs/segmentation.md explains it")
    distillation: SegmentorDistillation = Field(
        SegmentorDistillation(),  # pyright: ignore[reportCallIssue]
        description="learning from a trained segmentor; docs/distillation.md explains it",
    )

    @model_validator(mode="after")
    def _has_what_a_key_needs(self) -> Self:
        if self.class_weights and not self.losses:
            raise ValueError("task.class_weights needs task.losses, such as task.losses={cross_entropy: 1}")
        for key, given in (("task.spacing", self.spacing), ("task.figure=dice", self.figure == "dice")):
            if given and not self.figures:
                raise ValueError(f"{key} needs task.figures=medical")
        return self
