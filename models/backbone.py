"""What every backbone of ours shares, whatever its layout: its registration, classifier and weights."""

from typing import Any

from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from models.weights import Renames, load_weights, rename_state


class Backbone(nn.Module):
    """The part of timm's interface that does not depend on a net's layout.

    A subclass sets `num_features` and `head_drop`, makes the classifier by `reset_classifier`, and has
    `forward_features` and the rest of timm's interface.
    """

    renames: Renames = ()  # from the names in the authors' checkpoints to ours; an op's own are with the op
    map_norms = False  # whether the authors' code for dense features has a LayerNorm on each map
    out_indices: Any = (0, 1, 2, 3)  # of the maps that `features_only=True` gives
    num_features: int
    global_pool: nn.Module
    head_drop: nn.Module
    head: nn.Module

    @classmethod
    def build(cls, name: str, pretrained: bool = False, **kwargs) -> Any:
        """What a function under timm's `@register_model` returns: the net, or its maps with `features_only=True`."""
        return build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=lambda state, model: model.checkpoint_filter(state),
            feature_cfg={"out_indices": cls.out_indices, "feature_cls": "getter"},
            **kwargs,
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.reset_pool(global_pool)
        self.head = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def reset_pool(self, global_pool: str) -> None:
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if prefix and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the authors' names, or ours, under our names."""
        return rename_state(self, state)

    def load_pretrained(self, path: str) -> None:
        """What timm calls with the downloaded file of `pretrained=True`."""
        load_weights(self, path, drop_classifier=True)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
