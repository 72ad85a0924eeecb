"""8-bit ONNX files: onnxruntime's static quantisation with training images, and what it costs and gains.

Weights take one scale per output channel, activations one scale per tensor, from the smallest and largest values that
the calibration images give (Jacob et al., CVPR 2018, arXiv:1712.05877).
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from datamodules.images import Subset
from datamodules.loader import BatchFetcher, Loader
from datamodules.sampler import EvalSampler
from models.exporting import INPUT, load_onnx
from retinue.evaluation.statistics import paired_difference
from retinue.runs.export import Exportable, export
from retinue.runs.training import build_data
from retinue.utils.files import replacing

# Operators whose products are 8-bit. All others, such as norms and softmax, stay 32-bit.
QUANTISED = ("Conv", "MatMul", "Gemm")
# Repetitions of each timing, the fastest of which counts, and the number of images that it takes.
ROUNDS, TIMED_IMAGES = 5, 8


def export_int8(
    exportable: Exportable, cfg: DictConfig, path: Path, dynamic_size: bool, calibration: int, test_images: int
) -> str:
    """Write an 8-bit ONNX file of a classifier, and compare it with the 32-bit file on test images.

    Args:
        exportable: The net.
        cfg: Its config, whose data must be there.
        path: The file. It is written whole or not at all.
        dynamic_size: Let the height and width of the images vary.
        calibration: Number of training images from which the scales follow.
        test_images: Number of test images, at most, on which the files are compared.

    Returns:
        Lines on the check of the 32-bit file, on the loss of accuracy with its 95 % interval, and on the speed.

    Raises:
        ValueError: The task is no classification, the data are not there, or the net cannot be exported.
    """
    if cfg.task.name != "classification":
        raise ValueError(f"int8=true is for task=classification, not task={cfg.task.name}")
    data = build_data(cfg)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        whole = Path(folder) / "float32.onnx"
        checked = export(exportable, whole, "onnx", dynamic_size)
        images = (images for images, _ in batches(data, "train", calibration))
        quantize(whole, temporary, exportable.metadata, images)
        compared = compare(load_onnx(whole), load_onnx(temporary), data, exportable, test_images)
        smaller = whole.stat().st_size / temporary.stat().st_size
    return f"float32: {checked}\nint8: {compared}; the file is {smaller:.1f} times smaller"


def batches(data: Any, split: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) of `count` images of a split at most, drawn with a fixed seed, prepared as for a test."""
    source = data.images(split)
    chosen = Subset(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))
    sampler = EvalSampler(len(chosen), min(data.batch_size, 64))
    for batch in Loader(BatchFetcher(chosen, data.eval_transform, data.collate), sampler, num_workers=0):
        batch = data.on_after_batch_transfer(batch, 0)
        read = batch["index"] >= 0
        yield batch["image"][read].contiguous(), batch["label"][read]


def quantize(source: Path, target: Path, metadata: dict[str, str], images: Iterator[Tensor]) -> None:
    """Write the 8-bit form of an ONNX file.

    Args:
        source: The 32-bit file.
        target: The file to write.
        metadata: Its metadata, which the quantisation does not keep.
        images: Batches of normalised images (B, C, H, W).
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            batch = next(images, None)
            return None if batch is None else {INPUT: batch.numpy()}

    prepared = target.with_name(f"{target.stem}.prepared.onnx")
    try:
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, target, Reader(), op_types_to_quantize=list(QUANTISED), per_channel=True,
            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        prepared.unlink(missing_ok=True)
    model = onnx.load(target)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, target)


def compare(
    whole: Callable[[Tensor], Tensor],
    small: Callable[[Tensor], Tensor],
    data: Any,
    exportable: Exportable,
    test_images: int,
) -> str:
    """Return one line on accuracy and speed of a 32-bit and an 8-bit graph on test images."""
    subset = exportable.classes.subset
    hits: list[list[float]] = [[], []]
    first = None
    for images, labels in batches(data, "test", test_images):
        first = images[:TIMED_IMAGES] if first is None else first
        for graph, own in zip((whole, small), hits, strict=True):
            logits = graph(images)
            best = logits.argmax(1) if subset is None else torch.tensor(subset)[logits[:, list(subset)].argmax(1)]
            own += (best == labels).double().tolist()
    if first is None:
        raise ValueError("int8=true needs test images, and none can be read")
    change = paired_difference(hits[1], hits[0])
    before, after = (float(np.mean(own)) for own in hits)
    speed = _seconds(whole, first) / _seconds(small, first)
    return (
        f"top-1 {after:.4f} in place of {before:.4f} on {len(hits[0])} test images, difference {change.mean:+.4f} "
        f"({change.low:+.4f} to {change.high:+.4f}); {speed:.2f} times as fast for {len(first)} images on this CPU"
    )


def _seconds(graph: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the shortest of several times for a batch, after one run that is not timed."""
    graph(images)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        graph(images)
        times.append(time.perf_counter() - began)
    return min(times)
