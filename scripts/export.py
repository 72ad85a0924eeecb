"""Export a net: an ONNX file, a torch.export program, a safetensors file, or the folder of a Hugging Face hub.

    python scripts/export.py run=RUN format=onnx out=net.onnx
    python scripts/export.py model=swin model.size=tiny weights=swin_tiny.pth data=imagenet format=torch out=net.pt2
    python scripts/export.py run=RUN format=onnx out=net.onnx int8=true
    python scripts/export.py run=RUN format=hub out=FOLDER push_to_hub=owner/name

All other keys are those of `eval.py`. The file holds the preprocessing, the classes and the source of the net, takes
any number of images, and is checked against PyTorch before it takes its place. docs/export.md lists what can be
exported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from retinue.runs.arguments import quote_brackets
from retinue.runs.config import register_resolvers
from retinue.utils import command_line
from retinue.utils.errors import user_errors
from retinue.utils.paths import CONF


class Options(command_line.Options):
    out: Path = Field(description="file to write: .onnx, .pt2 or .safetensors; for format=hub a folder")
    format: Literal["onnx", "torch", "safetensors", "hub"] = Field("onnx", description="kind of the file")
    dynamic_size: bool = Field(False, description="onnx, torch: images of any size; tracing may take many minutes")
    int8: bool = Field(False, description="onnx, classification: 8-bit weights and activations, calibrated on images")
    calibration: int = Field(256, ge=1, description="int8: training images from which the ranges follow")
    test_images: int = Field(2000, ge=1, description="int8: test images at most on which both files are compared")
    push_to_hub: str | None = Field(None, description="hub: repository owner/name to which the folder is uploaded")

    @model_validator(mode="after")
    def _fits_the_format(self) -> Self:
        if self.int8 and self.format != "onnx":
            raise ValueError(f"int8=true is for format=onnx, not format={self.format}")
        if self.dynamic_size and self.format not in ("onnx", "torch"):
            raise ValueError(f"dynamic_size=true is for format=onnx or torch, not format={self.format}")
        if self.push_to_hub is not None and self.format != "hub":
            raise ValueError(f"push_to_hub={self.push_to_hub} needs format=hub, not format={self.format}")
        return self


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = Options.parse_some(arguments)
    from models.exporting import require_onnx
    from retinue.runs.export import SUFFIXES, compose_net, export, load_net

    if options.format == "onnx":
        require_onnx()
    if options.format != "hub":
        command_line.check_suffixes("out", [options.out], [SUFFIXES[options.format]])
    register_resolvers()
    cfg = compose_net(quote_brackets(overrides))
    exportable = load_net(cfg)
    if options.format == "hub":
        from retinue.results.hub import push, write_folder

        write_folder(exportable, cfg, options.out)
        if options.push_to_hub is not None:
            print(push(options.out, options.push_to_hub))
    elif options.int8:
        from retinue.runs.int8 import export_int8

        print(export_int8(exportable, cfg, options.out, options.dynamic_size, options.calibration, options.test_images))
    else:
        print(export(exportable, options.out, options.format, options.dynamic_size))
    print(options.out)


if __name__ == "__main__":
    with user_errors(CONF, "eval"):
        main()
