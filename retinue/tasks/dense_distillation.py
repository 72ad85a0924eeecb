"""Distillation between two detectors, or between two segmentors: the teacher, and the maps that are compared.

The maps are those of the backbone or of the neck, or a segmentor's logits before they are resized to the image, which
CWD compares (Shu et al., arXiv:2011.13256). `retinue.tasks.map_distillation` has the losses.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from datamodules.classes import Classes
from models.openmmlab.interface import DensePredictor
from models.openmmlab.segmentor import DecoderSegmentor
from models.preprocessing import read_run, run_config
from models.weights import load_weights
from retinue.tasks.distillation import restandardise
from retinue.tasks.map_distillation import Level

# Side of the image, in pixels, for which the shapes of a neck's maps are found: a multiple of all strides.
PROBED_SIDE = 256


class DenseTeacher:
    """The frozen detector or segmentor of a run, from whose maps a student learns.

    The teacher sees the student's images with the mean and deviation of its own run. This class is not an `nn.Module`,
    so that the teacher is not part of the student's checkpoints, optimiser and average of weights.

    Args:
        checkpoint: Checkpoint in the folder of the teacher's run, as RUN/checkpoints/best.ckpt.
        task: Name of the task's class, which is the run's too.
        build_net: The task's `build_net`.
        part: "backbone", "neck" or "logits".

    Attributes:
        net: The teacher.
        classes: Names of the classes that it was trained for.
        levels: Its maps.

    Raises:
        ValueError: The file is no checkpoint in a run's folder, the run has another task, the net lacks the part, or
            the run's config or weights cannot be read.
    """

    def __init__(self, checkpoint: str, task: str, build_net: Callable[[Any, Any], nn.Module], part: str):
        path = run_config(checkpoint)
        if path is None or not Path(checkpoint).expanduser().is_file():
            raise ValueError(
                "task.distillation.teacher must be a checkpoint in the folder of a run, such as "
                f"RUN/checkpoints/best.ckpt, not {checkpoint}"
            )
        name, preprocessing = read_run(path)
        cfg: Any = OmegaConf.load(path)
        if str(cfg.task.get("_target_")).rpartition(".")[2] != task:
            raise ValueError(f"task.distillation.teacher={checkpoint} is of a run with task={name}, not of this task")
        classes = path.with_name("classes.json")
        if not classes.is_file():
            raise ValueError(f"task.distillation.teacher={checkpoint}: {classes}, which names its classes, is missing")
        self.classes = list(Classes.read(classes).names)
        self.mean, self.std = preprocessing["mean"], preprocessing["std"]
        if "pretrained" in cfg.model:
            cfg.model.pretrained = False
        # A detector that was trained with masks has them in its head; the data of the student do not matter.
        data = SimpleNamespace(in_chans=len(self.mean), num_classes=len(self.classes), has_masks=True)
        net: Any = build_net(cfg, data)
        load_weights(net, checkpoint)
        self.levels = levels(net, part)
        self.net: Any = net.eval().requires_grad_(False)
        self.part, self._recorder = part, Recorder(part_of(net, part))

    def __deepcopy__(self, memo: dict) -> "DenseTeacher":
        # A copy of the task needs no second teacher.
        return self

    @torch.no_grad()
    def maps(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
        """Return the teacher's maps, (B, C, H, W) each.

        Args:
            image: The student's images (B, C, H, W), normalised with `mean` and `std`.
            mean: The student's mean of each channel.
            std: The student's standard deviation of each channel.
        """
        # Moving the net again in each step would take as long as launching its kernels.
        if next(self.net.parameters()).device != image.device:
            self.net.to(image.device)
        image = restandardise(image, mean, std, self.mean, self.std)
        if self.part == "logits":
            self.net.logits(image)
        else:
            maps = self.net.backbone(image)
            if self.part == "neck":
                self.net.neck(maps)
        return self._recorder.take()


class Recorder:
    """Keeps the maps that a module returned last.

    Args:
        module: A module that returns a map or a sequence of maps, of which the logits of a decoder with auxiliary
            logits are the first.
    """

    def __init__(self, module: nn.Module):
        self._output: Any = None
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output

    def take(self) -> list[Tensor]:
        """Return the maps of the last forward pass, and forget them."""
        output, self._output = self._output, None
        return [output] if isinstance(output, Tensor) else list(output)


def part_of(net: Any, part: str) -> nn.Module:
    """Return the module of a detector or segmentor whose outputs are the maps of a part.

    Raises:
        ValueError: The net has no such part.
    """
    if part == "backbone":
        return net.backbone
    module = getattr(net, "neck", None)
    if part == "logits":
        module = net.decode_head if isinstance(net, DecoderSegmentor) else getattr(net.decode_head, "conv_seg", None)
    if not isinstance(module, nn.Module):
        missing = "neck" if part == "neck" else "logits per pixel in training"
        raise ValueError(
            f"task.distillation.part={part}: a {type(net).__name__} with this head has no {missing}; "
            "task.distillation.part=backbone works with any head"
        )
    return module


@torch.no_grad()
def levels(net: DensePredictor, part: str) -> list[Level]:
    """Return the maps of a part of a detector or segmentor; logits count as one map of stride 1.

    Raises:
        ValueError: The net has no such part.
    """
    module = part_of(net, part)
    if part == "logits":
        # The number of classes does not matter, since logits are not projected.
        return [Level(0, 1)]
    backbone = [Level(*pair) for pair in zip(net.backbone.channels, net.backbone.strides, strict=True)]
    if part == "backbone":
        return backbone
    # In evaluation mode, and a copy, so that no running statistics change.
    neck = copy.deepcopy(module).eval()
    device = next(neck.parameters()).device
    maps = neck(tuple(
        torch.zeros(1, channels, PROBED_SIDE // stride, PROBED_SIDE // stride, device=device)
        for channels, stride in backbone
    ))  # fmt: skip
    return [Level(m.shape[1], PROBED_SIDE // m.shape[3]) for m in maps]
