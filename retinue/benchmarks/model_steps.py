"""The steps that the benchmark of models times: inference, training, and the parts of a training step."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import create_model
from ops.backend import redirecting, using
from retinue.benchmarks import nets
from retinue.benchmarks.forms import EAGER, GRAPH, in_form, prepare
from retinue.benchmarks.formulations import PLAIN_PYTORCH
from retinue.benchmarks.timing import autocast

NUM_CLASSES, IN_CHANS = 1000, 3


@dataclass(frozen=True)
class Setting:
    """Conditions under which all models of a comparison are measured.

    Attributes:
        image_size: side of the square images, in pixels.
        batch_size: images of a batch.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", or the type of autocast: "bfloat16" or "float16".
        channels_last: store weights and images in channels-last memory format.
    """

    image_size: int
    batch_size: int
    device: str
    dtype: str
    channels_last: bool

    @property
    def is_cuda(self) -> bool:
        """True if the device is a GPU."""
        return torch.device(self.device).type == "cuda"


def build(model: Mapping[str, Any], image_size: int) -> torch.nn.Module:
    """Build a model for 1000 classes from the arguments of `models.create_model`."""
    return create_model(model, NUM_CLASSES, IN_CHANS, image_size)


@dataclass(frozen=True)
class Parts:
    """The parts of a training step, which are called in this order.

    Attributes:
        forward: runs the model on a batch, and returns the cross-entropy.
        backward: computes the gradients of the loss.
        update: steps the optimiser, and removes the gradients.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    update: Callable[[], None]


def make_parts(model: Mapping[str, Any], setting: Setting, form: str = EAGER, formulation: str = nets.OURS) -> Parts:
    """Return the parts of a training step; the arguments are those of `make_step`."""
    net, image, context = _prepare(model, setting, True, form, formulation)
    label = torch.randint(NUM_CLASSES, (setting.batch_size,), device=setting.device)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-5, fused=setting.is_cuda, capturable=setting.is_cuda and form == GRAPH
    )

    def forward() -> Tensor:
        with context():
            return F.cross_entropy(net(image), label)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Parts(forward, lambda loss: loss.backward(), update)


def make_step(
    model: Mapping[str, Any], setting: Setting, train: bool, form: str = EAGER, formulation: str = nets.OURS
) -> Callable[[], object]:
    """Return a function that runs the model once on a batch, or with `train` trains it for one step.

    Inference is a forward pass in evaluation mode; a training step is forward, cross-entropy, backward and an update by
    AdamW, fused on a GPU. Weights and images are random and lie on the device.

    Args:
        model: arguments of `models.create_model`.
        setting: conditions of the measurement.
        train: train the model.
        form: a name of `retinue.benchmarks.forms.FORMS`.
        formulation: formulation of the attention, as in `retinue.benchmarks.nets.make_step`.
    """
    if train:
        parts = make_parts(model, setting, form, formulation)

        def learn() -> None:
            parts.backward(parts.forward())
            parts.update()

        return in_form(learn, form)
    net, image, context = _prepare(model, setting, False, form, formulation)

    @torch.no_grad()
    def infer() -> None:
        with context():
            net(image)

    return in_form(infer, form)


def _prepare(
    model: Mapping[str, Any], setting: Setting, train: bool, form: str, formulation: str
) -> tuple[torch.nn.Module, Tensor, Callable[[], contextlib.AbstractContextManager]]:
    """Return a prepared model, a batch of images, and the context in which the model must be called."""
    torch.manual_seed(0)
    net = build(model, setting.image_size).to(setting.device).train(train)
    image = torch.randn(setting.batch_size, IN_CHANS, setting.image_size, setting.image_size, device=setting.device)
    if setting.channels_last:
        net, image = net.to(memory_format=torch.channels_last), image.contiguous(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    prepare(net, form)
    backend, redirections = "torch" if formulation == PLAIN_PYTORCH else "auto", nets.redirections_to(formulation)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        # Casts of weights that autocast keeps would not be repeated when a graph is replayed.
        precision = autocast(setting.device, setting.dtype, cache_enabled=form != GRAPH)
        with using(backend), redirecting(redirections), precision:
            yield

    return net, image, context
