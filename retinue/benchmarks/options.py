"""Types of options that several benchmarks take."""

from typing import Annotated, Literal

from pydantic import AfterValidator

Pair = tuple[int, int]
Dtype = Literal["float32", "bfloat16", "float16"]
# Members of `retinue.benchmarks.forms.FORMS`.
Form = Literal["eager", "compiled", "whole", "reduce-overhead", "graph"]

MIN_SIDE = 32


def parse_image_size(text: str) -> Pair:
    """Return (height, width) in pixels of "800x1333", or of "224", which is a square.

    Raises:
        ValueError: the text is not such a size, or a side has fewer than `MIN_SIDE` pixels.
    """
    sides = text.split("x")
    if not (1 <= len(sides) <= 2 and all(side.isdecimal() and int(side) >= MIN_SIDE for side in sides)):
        raise ValueError(f"a size such as 224 or 800x1333 (height x width), with sides of at least {MIN_SIDE} pixels")
    return (int(sides[0]), int(sides[-1]))


def _check_image_size(text: str) -> str:
    parse_image_size(text)
    return text


# The text of an image size. `parse_image_size` returns its height and width.
ImageSize = Annotated[str, AfterValidator(_check_image_size)]
