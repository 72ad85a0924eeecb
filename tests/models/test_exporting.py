"""Graphs give what their nets give. `python -m tests.models.test_exporting` prints the table of docs/export.md."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from models import exporting
from retinue.utils.paths import PROJECT
from tests.models.test_backbones import NAMES, build

# The smallest net of each file of backbones.
SMALLEST = list({model_entrypoint(name).__module__: name for name in reversed(NAMES)}.values())[::-1]
# The nets of timm that have a config of their own, and two shapes that all other nets share.
OF_TIMM = ("test_convnext", "test_resnet", "test_vit")
SIDE = 64
DOCS = (PROJECT / "docs/export.md").read_text(encoding="utf-8")


def export(net: nn.Module, shape: tuple[int, ...], path: Path, dynamic_size: bool = False) -> exporting.Agreement:
    program = exporting.trace(net, shape, dynamic_size)
    exporting.save_onnx(program, path, {"classes": "é"})
    return exporting.check(net, exporting.load_onnx(path), shape, exporting.variable_dimensions(program))


def row(name: str, folder: Path) -> str:
    """Export a net with few blocks, and return its row of the table in docs/export.md."""
    net = build(name, num_classes=10).requires_grad_(False) if name in SMALLEST else timm.create_model(name).eval()
    try:
        agreement = export(net, (3, SIDE, SIDE), folder / f"{name}.onnx")
    except ValueError as error:
        return f"| `{name}` | no | {error} |"
    number = "any number of images" if len(agreement.shapes) > 1 else "1 image"
    return f"| `{name}` | {number} | |"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*SMALLEST, *OF_TIMM) if f"| `{name}` |" in DOCS])
def test_the_table_of_the_docs_is_true(name, tmp_path):
    # Without the reason, whose numbers may differ between machines.
    assert row(name, tmp_path).rsplit(" | ", 1)[0] in DOCS


class Small(nn.Module):
    """Convolutions and a linear classifier."""

    def __init__(self, stride: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


class Branching(Small):
    """A net whose computation depends on the values in an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.mean()) >= 0 else -x)


class Sized(Small):
    """A net whose logits contain the width of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.shape[-1] * torch.arange(4.0)


def test_an_onnx_file_takes_any_number_and_size_of_images_and_keeps_its_metadata(tmp_path):
    import onnx

    agreement = export(Small(), (3, 16, 24), tmp_path / "net.onnx", dynamic_size=True)
    sizes = [shape[2:] for shape in agreement.shapes]
    assert [shape[0] for shape in agreement.shapes] == [1, 2, 5, 5, 5, 5]
    assert sizes == [(16, 24)] * 3 + [(48, 56), (48, 24), (21, 35)]
    assert agreement.error < 1e-5 and agreement.same_class == 1
    model = onnx.load(tmp_path / "net.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes": "é"}


def test_a_net_that_looks_at_values_is_refused_in_one_line():
    with pytest.raises(ValueError, match="Branching cannot be exported: ") as error:
        exporting.trace(Branching(), (3, 8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (lambda net, x: net(x) * (1 + 1e-2), "relative error"),
        (lambda net, x: net(x)[:1].expand(len(x), -1), "relative error"),
        (lambda net, x: net(x)[:, :3], "gives logits"),
        (lambda net, x: net(x) if len(x) == 2 else net(x[:, :1]), "refuses images 1 x 3 x 8 x 8"),
        (lambda net, x: net(x) * float("nan"), "relative error nan"),
    ],
)
def test_a_graph_that_differs_from_its_net_is_found(graph: Any, message: str):
    net = Small().eval()
    with pytest.raises(ValueError, match=message):
        exporting.check(net, lambda x: graph(net, x), (3, 8, 8), {0})


def test_a_graph_that_holds_for_one_size_only_is_found():
    net, small = Sized().eval(), Small().eval()
    with pytest.raises(ValueError, match="for images 5 x 3 x 40 x 40 the exported graph differs"):
        exporting.check(net, lambda x: small(x) + 8 * torch.arange(4.0), (3, 8, 8), {0, 2, 3})


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        for each in sys.argv[1:] or [*SMALLEST, *OF_TIMM]:
            print(row(each, Path(temporary)), flush=True)
