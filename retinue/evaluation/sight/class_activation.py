"""Class activation maps of any block of a net, by the library torchcam.

The methods: gradcam (Selvaraju et al., arXiv:1610.02391), gradcampp (arXiv:1710.11063), xgradcam (arXiv:2008.02312),
layercam (Jiang et al., TIP 2021).
"""

from typing import Any

import torch
from torch import Tensor
from torchcam.methods import LayerCAM, XGradCAM
from torchcam.methods.gradient import GradCAM, GradCAMpp

from retinue.evaluation.sight.blocks import split_tokens

METHODS = {"gradcam": GradCAM, "gradcampp": GradCAMpp, "xgradcam": XGradCAM, "layercam": LayerCAM}


def class_activation(
    net: Any, images: Tensor, module: str, method: str = "gradcam", classes: list[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Return the class activation map of each image, from 0 to 1, and the class that it is for.

    Args:
        net: Classifier from images (B, C, h, w) to logits (B, K).
        images: Normalised images.
        module: Name of the block whose map is read.
        method: A key of `METHODS`.
        classes: Class of each image; by default the predicted ones.

    Returns:
        (B, H, W) with the block's H and W, and B classes.
    """
    size = (images.shape[2], images.shape[3])

    def to_channels_first(output: Any) -> Tensor:
        return split_tokens(net, output, size)[0].permute(0, 3, 1, 2)

    # The gradient must reach the block although the parameters of the net may be frozen.
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad(), METHODS[method](net, module, reshape_transform=to_channels_first) as extractor:
        scores = net(images)
        chosen: list[int] = scores.argmax(1).tolist() if classes is None else classes
        (maps,) = extractor(chosen, scores)
    return maps.detach(), chosen
