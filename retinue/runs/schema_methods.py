"""Keys of `conf/method/*.yaml`: how a backbone is pretrained."""

from typing import Annotated

from pydantic import Field

from retinue.runs.schema_sections import Count, Expected, Keys, Name, NonNegative, PositiveShare, Section, Share, Sides


class Mask(Keys):
    """`mask` of a view."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the patches that are masked")
    patch: Count | None = Field(
        None, description="side of a patch in pixels; null: 32, for images below 128 pixels an eighth of the side"
    )


class Colours(Keys):
    """`colours` of a view."""

    jitter: Annotated[list[NonNegative], Field(min_length=4, max_length=4)] | None = Field(
        None, description="maximum changes of brightness, contrast, saturation and hue; null: none"
    )
    jitter_prob: Share = Field(0.8, description="probability of the jitter")
    grey: Share = Field(0.0, description="probability of a grey view")
    blur: Share = Field(0.0, description="probability of a Gaussian blur with a deviation of 0.1 to 2 pixels")
    solarize: Share = Field(0.0, description="probability that bright values are inverted")


class View(Keys):
    """An entry of `method.views`."""

    number: Count = Field(1, description="number of views of this kind")
    size: Sides | None = Field(None, description="side of the views in pixels, or [height, width]; null: the data's")
    share: PositiveShare | None = Field(
        None, description="side as a share of the data's image size, to multiples of 8 pixels; null: by `size`"
    )
    mask: Mask | None = Field(None, description="what is masked; null: nothing")
    colours: Colours | None = Field(None, description="changes of the colours; null: none")
    augment: Section = Field({}, description="changes of recipe.augment for these views")


class Method(Keys):
    """`conf/method/*.yaml`; further keys are arguments of the method's class."""

    name: Name = Field(description="name of the method in results")
    recipe: Name | None = Field(None, description="recipe on data that are not small")
    views: Annotated[dict[str, View], Field(min_length=1), Expected("a mapping of names to views")] = Field(
        description="views of each image that the method takes, by name"
    )
