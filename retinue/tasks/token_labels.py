"""Token labelling (Jiang et al., NeurIPS 2021, arXiv:2104.10858): a soft label for each token of the map.

The labels are those of stored maps, as `datamodules.token_maps` reads them, or those of the teacher of
`task.distillation`, which sees the training images after all augmentation and mixing. Written after the paper and the
authors' repository, zihangJiang/TokenLabeling (Apache-2.0), whose crops of label maps have rows and columns
interchanged; here they follow the image.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.token_maps import token_scores
from models.backbone import Backbone
from retinue.utils.arithmetic import ceil_div

TEACHER = "teacher"


def token_grid(model: Any, image: Tensor) -> tuple[int, int]:
    """Return rows and columns of a net's last map for images (B, C, H, W)."""
    stride = model.feature_info[-1]["reduction"]
    return ceil_div(image.shape[2], stride), ceil_div(image.shape[3], stride)


class TokenLabels:
    """Source of the labels of tokens.

    Args:
        model: Net with a classifier of tokens.
        source: "teacher", or the folder of stored label maps.
        weight: Weight of the tokens' loss; 0.5 in the paper.
        image_label: Label of the image's own classifier: "maps" is the mean of the tokens' scores, as in the authors'
            code, "truth" the data's label.
        num_classes: Number of classes K.
        smoothing: Share of each label that is spread over all classes.

    Raises:
        ValueError: The net has no classifier of tokens.
    """

    def __init__(
        self, model: nn.Module, *, source: str, weight: float, image_label: str, num_classes: int, smoothing: float
    ):
        if not isinstance(model, Backbone) or model.token_classifier is None:
            raise ValueError(
                "task.token_labels needs a net with a classifier of tokens: model=lvvit, model=spectformer of a size "
                "h_*, or model=uniformer +model.args.token_label=true"
            )
        if image_label not in ("maps", "truth"):
            raise ValueError(f"task.token_labels.image_label must be maps or truth, not {image_label!r}")
        self.model = model
        self.from_teacher = source == TEACHER
        self.weight, self.image_label = weight, image_label
        self.num_classes, self.smoothing = num_classes, smoothing

    def targets(self, batch: Mapping[str, Any], teacher_scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the labels of the tokens (B, N, K), and those of the images (B, K) if they replace the data's.

        Args:
            batch: A training batch, with label maps if there are no scores of a teacher.
            teacher_scores: Scores (B, K, h, w) of a teacher that has seen the mixed images; None takes the label maps,
                which are mixed here as the images were.
        """
        grid = token_grid(self.model, batch["image"])
        scores = teacher_scores
        if scores is None:
            scores = token_scores(batch["map_scores"], batch["map_labels"], batch["map_view"], grid, self.num_classes)
        tokens, image = self._soften(scores.flatten(2).transpose(1, 2)), self._soften(scores.mean((2, 3)))
        if teacher_scores is None and "mix" in batch:
            mix = batch["mix"]
            own = F.adaptive_avg_pool2d(mix.own, grid).flatten(1)[..., None]  # (B, N, 1)
            tokens = own * tokens + (1 - own) * tokens[mix.partner]
            image = mix.share * image + (1 - mix.share) * image[mix.partner]
        return tokens, image if self.image_label == "maps" else None

    def _soften(self, scores: Tensor) -> Tensor:
        """Return the smoothed probabilities of scores (..., K)."""
        return scores.float().softmax(-1) * (1 - self.smoothing) + self.smoothing / self.num_classes
