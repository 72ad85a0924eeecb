"""Keys of `conf/model/*.yaml` and `conf/head/*.yaml`."""

from typing import Annotated

from pydantic import Field

from retinue.runs.schema_sections import Expected, Keys, Name, Section

Gates = Annotated[str | dict | list, Expected("a gate's name, a mapping, or a list")]
Reduction = Annotated[str | dict, Expected("a reduction's name, or a mapping")]


class Model(Keys):
    """`conf/model/*.yaml`; further keys are arguments of the net."""

    name: Name | None = Field(None, description="name of a net in timm's registry")
    recipe: Name | None = Field(None, description="recipe on data that are not small")
    size: Name | None = Field(None, description="a key of sizes; null: the first size that suits the images")
    sizes: Section | None = Field(None, description="nets of timm's registry with arguments of timm.create_model")
    pretrained: bool = Field(False, description="download timm's weights")
    gates: Gates | None = Field(
        None, description="gates on the maps of any net: a name, a mapping with arguments, or a list by stage"
    )
    reduction: Reduction | None = Field(
        None, description="token reduction of a ViT-shaped net: a name, or a mapping with arguments"
    )
    args: Section | None = Field(None, description="further arguments of the net")


class Head(Keys):
    """`conf/head/*.yaml`."""

    name: Name | None = Field(description="name of the head in results")
    size: Name | None = Field(None, description="a key of sizes; null: small for small data, otherwise full")
    sizes: Section | None = Field(None, description="changes of the package's config by size")
    backbone: Section | None = Field(None, description="arguments of models.dense.DenseBackbone that the head changes")
    neck: Name | None = Field(None, description="our neck, for heads with a feature pyramid")
    args: Section | None = Field(None, description="further changes of the package's config")
