"""Colour changes of the views of joint-embedding methods: jitter, grey, blur and solarisation.

Papers: SimCLR (Chen et al., ICML 2020, arXiv:2002.05709, appendix A) for jitter, grey and blur, and BYOL (Grill et al.,
NeurIPS 2020, arXiv:2006.07733, appendix B) for solarisation and for probabilities that differ between the views.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import ColorJitter

from datamodules.transforms import to_array

# Minimum and maximum standard deviation of the blur in pixels.
BLUR = (0.1, 2.0)


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Random changes of a view's colours, in the order of the attributes; each has its probability.

    Attributes:
        jitter: maximum relative changes of brightness, contrast and saturation, and of the hue as a share of the colour
            circle; they are applied in random order. None leaves them out.
        jitter_prob: probability of the jitter.
        grey: probability of a grey view.
        blur: probability of a Gaussian blur.
        solarize: probability that values from 128 up are inverted.

    Raises:
        ValueError: if a value is out of its range.
    """

    jitter: tuple[float, float, float, float] | None = None
    jitter_prob: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter_prob", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"a view's colours.{name} must be from 0 to 1, not {getattr(self, name)!r}")
        if self.jitter is None:
            return
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                "a view's colours.jitter must be changes of brightness, contrast, saturation and hue (at most 0.5), "
                f"not {list(self.jitter)}"
            )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Change the colours of an image, uint8 (H, W, C) with 1 or 3 channels.

        All random numbers come from the global generators of Python and torch.
        """
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        if self.jitter is not None and random.random() < self.jitter_prob:
            picture = ColorJitter(*self.jitter)(picture)
        if random.random() < self.grey:
            picture = picture.convert("L").convert(picture.mode)
        if random.random() < self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR)))
        if random.random() < self.solarize:
            picture = ImageOps.solarize(picture)
        return to_array(picture)
