"""MaskMix as a module, for the reference vector of MixPro."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.mixing import MaskMix, mix_in_cells


class MaskMixedBatch(nn.Module):
    """A batch that is mixed as the vector's notes say; the vector's only weight stands for no weights.

    Image i is mixed with image i + 1, there are ten classes, image i has the label i, and NumPy's seed is 0.
    """

    def __init__(self):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the images, the targets, which patches of 14 pixels are an image's own, and the label's share.

        The share comes with the sum of each target's values, which is 1.
        """
        state, image, size = np.random.get_state(), x.clone(), len(x)
        np.random.seed(0)
        mix = mix_in_cells(image, MaskMix(cell=56), torch.arange(1, size + 1) % size)
        np.random.set_state(state)
        targets = mix.targets(torch.arange(size), 10, 0.1)
        own = F.interpolate(mix.own, scale_factor=1 / 14, mode="nearest")[:, 0]
        return image, targets, own, torch.stack([torch.tensor(mix.share).to(x), targets[0].sum().to(x)])
