"""Types, ranges and meanings of the keys of the section `panel` of eval.py."""

from typing import Annotated, Literal

from pydantic import Field

from retinue.runs.schema_sections import CorruptionName, Count, Keys, PathText, Positive


class Sets(Keys):
    """`panel.sets`: folders of ImageNet's other test sets."""

    v2: PathText | None = Field(None, description="folder of ImageNet-V2")
    a: PathText | None = Field(None, description="folder of ImageNet-A")
    r: PathText | None = Field(None, description="folder of ImageNet-R")
    sketch: PathText | None = Field(None, description="folder of ImageNet-Sketch")
    objectnet: PathText | None = Field(None, description="folder of ObjectNet")
    c: PathText | None = Field(None, description="folder of ImageNet-C")


class Panel(Keys):
    """`conf/panel/robustness.yaml`."""

    name: Literal["robustness"] = Field(description="name of the panel")
    corruptions: list[CorruptionName] = Field(description="corruptions of the test images, made as data.corrupt does")
    severities: Annotated[list[Annotated[int, Field(ge=1, le=5)]], Field(min_length=1)] = Field(
        description="strengths of the corruptions"
    )
    sizes: list[Positive] = Field(description="sides of the images relative to data.image_size, to multiples of 8 px")
    epsilons: list[Positive] = Field(description="largest change of a value from 0 to 255 by FGSM and PGD")
    pgd_steps: Count = Field(description="steps of PGD")
    sets: Sets = Field(description="folders of ImageNet's other test sets")
