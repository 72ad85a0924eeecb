"""Measurement of what limits a training run: the input of images, or the training step."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from retinue.benchmarks.models import build
from retinue.benchmarks.pipeline import make_photos, retinue_data
from retinue.benchmarks.timing import Row, Timing, autocast, make_row, synchronize


def measure(
    model: str,
    device: torch.device,
    dtype: str,
    image_size: int,
    batch_size: int,
    *,
    workers: int,
    batches: int,
    augment: Mapping[str, str | None],
) -> list[Row]:
    """Measure how many images a second a core loads, the input delivers, the step trains, and both together do.

    Args:
        model: timm's name of the net that is trained, with AdamW.
        device: device of the training.
        dtype: "float32", or the type of autocast.
        image_size: side of the crops in pixels.
        batch_size: images of a batch.
        workers: number of loading processes.
        batches: number of batches that each figure is a mean of.
        augment: changes of the recipe's augmentation, such as `device` and `decode`.

    Returns:
        The rows `core`, `input`, `step` and `input and step`. `core` is one core that loads without the device's part.
        `cores` is the number of cores whose input keeps up with the step.
    """
    step = make_step(model, device, dtype, image_size)
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), max(128, 2 * batch_size))

        def source(workers: int) -> Any:
            data: Any = retinue_data(Path(folder), image_size, batch_size, workers, **augment)
            # The data module reads these attributes of Lightning's trainer.
            data.trainer = SimpleNamespace(
                strategy=SimpleNamespace(root_device=device), num_devices=1, global_rank=0, world_size=1
            )
            return data

        alone, shared = source(0), source(workers)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        core = _seconds(loaded(alone), lambda batch: None, batches, skipped=1)
        torch.set_num_threads(threads)
        delivered = (to_device(batch, shared, device) for batch in loaded(shared))
        # Batches that lie ready when the clock starts would make the input look quicker.
        ready = 2 * workers + 1
        step(kept := next(delivered))
        seconds = {
            "core": core,
            "input": _seconds(delivered, lambda batch: None, batches, ready),
            "step": _seconds(itertools.repeat(kept), step, batches, skipped=1),
            "input and step": _seconds(delivered, step, batches, ready),
        }
        delivered.close()
    return [
        make_row(
            what,
            Timing((duration,)),
            shape=f"{batch_size}x3x{image_size}x{image_size}",
            dtype=dtype,
            device=device,
            model=model,
            images_per_s=batch_size / duration,
            workers=workers,
            cores=seconds["core"] / seconds["step"],
        )
        for what, duration in seconds.items()
    ]


def verdict(rows: list[Row]) -> str:
    """Return in one sentence what limits a run, from the rows of `measure`."""
    rates: dict[Any, Any] = {row["what"]: row["images_per_s"] for row in rows}
    slower = min(("input", "step"), key=lambda what: rates[what])
    return (
        f"The {slower} limits the run: {rows[0]['workers']} loading processes deliver {rates['input']:.0f} images/s, "
        f"the step trains {rates['step']:.0f}, both together reach {rates['input and step']:.0f}; one core loads "
        f"{rates['core']:.0f}, so the step needs {rows[0]['cores']:.1f} cores."
    )


def make_step(model: str, device: torch.device, dtype: str, image_size: int) -> Callable[[dict], None]:
    """Return a function that trains a net on a batch: forward, cross-entropy, backward and an update by AdamW."""
    net = build({"name": model}, image_size).to(device).train()
    net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=device.type == "cuda")

    def step(batch: dict) -> None:
        with autocast(device, dtype):
            loss = F.cross_entropy(net(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loaded(data: Any) -> Iterator[dict]:
    """Yield the loader's batches without end, epoch by epoch."""
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def to_device(batch: dict, data: Any, device: torch.device) -> dict:
    """Send a batch to the device and do there what the data module does there."""
    sent = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return data.on_after_batch_transfer(sent, 0)


def _seconds(batches: Iterator[dict], use: Callable[[dict], None], count: int, skipped: int) -> float:
    """Return the mean seconds to take and use a batch, after some that are not timed."""
    for batch in itertools.islice(batches, skipped):
        use(batch)
    synchronize()
    began = time.perf_counter()
    for batch in itertools.islice(batches, count):
        use(batch)
    synchronize()
    return (time.perf_counter() - began) / count
