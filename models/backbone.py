"""Registration, classifier and weights: what all backbones of this project share, whatever their layout."""

from typing import Any, cast

from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from models.weights import Renames, apply_renames, load_weights
from ops.losses import Losses


def run_block(block: Any, *args: Any, recompute: bool, losses: Losses | None, **kwargs: Any) -> Any:
    """Run a block of a net.

    Args:
        block: Block, or another function.
        args: Arguments of the block.
        recompute: Recompute the block in the backward pass (gradient checkpointing).
        losses: Auxiliary losses, to which those of the block are added; None for a block without losses, or if they are
            not wanted.
        kwargs: Arguments of the block.
    """
    if losses is None:
        return checkpoint(block, *args, **kwargs) if recompute else block(*args, **kwargs)

    # The losses are outputs of what is recomputed, so the second run adds nothing.
    def with_losses(*args: Any) -> tuple[Any, dict[str, list[Tensor]], Tensor | None]:
        own = Losses(wants_attention=losses.wants_attention)
        return block(*args, losses=own, **kwargs), own.values, own.attention

    out, values, attention = cast(Any, checkpoint)(with_losses, *args) if recompute else with_losses(*args)
    for name, scalars in values.items():
        losses.add(name, *scalars)
    if attention is not None:
        losses.attention = attention
    return out


class Backbone(nn.Module):
    """The part of timm's interface that does not depend on a net's layout.

    A subclass sets `num_features` and `head_drop`, creates the classifier by `reset_classifier`, and defines
    `reset_pool`, `forward_features` and the rest of timm's interface.

    Attributes:
        renames: Renames from the weight names in the authors' checkpoints to ours. An op has its own renames.
        map_norms: Whether the authors' detection and segmentation code applies a LayerNorm to each map. A class whose
            authors apply another norm has its class as `map_norm`.
        decays_tables: Whether the authors apply weight decay to the tables of relative position biases.
        out_indices: Indices of the maps that `features_only=True` returns by default.
        num_features: Number of channels that the classifier reads.
        global_pool: Module that pools the final features.
        head_drop: Dropout before the classifier.
        head: Classifier, or `nn.Identity` if there is none.
        classifiers: Names of the classifier and of further ones of the same width, whose scores count too.
    """

    renames: Renames = ()
    map_norms = False
    decays_tables = False
    out_indices: Any = (0, 1, 2, 3)
    num_features: int
    global_pool: nn.Module
    head_drop: nn.Module
    head: nn.Module
    classifiers: tuple[str, ...] = ("head",)

    @classmethod
    def build(cls, name: str, pretrained: bool = False, **kwargs) -> Any:
        """Build the net, or with `features_only=True` a module that returns its maps.

        An entry point, which is a function under timm's `@register_model`, returns the result.

        Args:
            name: Registry name, which has an entry in the file's `default_cfgs`.
            pretrained: Load the weights that the entry in `default_cfgs` names.
            kwargs: Arguments of the class or of `timm.models.build_model_with_cfg`.
        """
        return build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_filter_fn=lambda state, model: model.checkpoint_filter(state),
            feature_cfg={"out_indices": cls.out_indices, "feature_cls": "getter"},
            **kwargs,
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes leave it out, and None keeps the pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.reset_pool(global_pool)
        for name in self.classifiers:
            head = nn.Identity()
            if num_classes:
                weight = next(self.parameters())
                head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
                trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
            setattr(self, name, head)

    def reset_pool(self, global_pool: str) -> None:
        """Set `global_pool` to a module of that kind; "" pools nothing."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay, as each module's `no_weight_decay` lists them."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if prefix and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
            if not (self.decays_tables and name.endswith("relative_position_bias_table"))
        }

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights under our names; `state` has the authors' names or ours."""
        return apply_renames(self, state)

    def load_pretrained(self, path: str) -> None:
        """Load the file that timm has downloaded for `pretrained=True`; a classifier of another width is left out."""
        load_weights(self, path, drop_classifier=True)

    def forward_features(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        """Compute the features before pooling; auxiliary losses of the ops are added to `losses`."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features and classify them, (B, num_classes); `pre_logits` returns them before the classifier."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    @property
    def token_classifier(self) -> nn.Module | None:
        """Classifier of each token of the map, which token labelling trains; None if there is none."""
        return None

    def map_tokens(self, features: Tensor) -> Tensor:
        """Return the tokens of the map (B, N, C), in rows, among the final features."""
        raise NotImplementedError

    def forward(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        if losses is None:
            return self.forward_head(self.forward_features(x))
        features = self.forward_features(x, losses)
        if losses.token_labels is None:
            return self.forward_head(features)
        assert self.token_classifier is not None
        scores = self.token_classifier(self.map_tokens(features))
        if scores.shape != losses.token_labels.shape:
            counts = f"{losses.token_labels.shape[1]} tokens have labels, and {scores.shape[1]} are left"
            raise ValueError(f"token labels need a net that keeps all tokens, such as model=lvvit: {counts}")
        losses.add("token_labels", F.cross_entropy(scores.flatten(0, 1), losses.token_labels.flatten(0, 1)))
        # The label of the image is learned by the image's classifier alone, as in the authors' code.
        return Backbone.forward_head(self, features)

    def forward_with_losses(
        self, x: Tensor, target: Tensor | None = None, losses: Losses | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `forward` returns, and the auxiliary losses of this forward pass by name, scalars.

        `ops.losses.loss_weights` names the losses that a net has. ViT-shaped nets compare their final tokens with those
        of a teacher, `target`, and return the loss `tokens`. `losses`, which may ask for more, stands for `target`.
        """
        losses = Losses(target) if losses is None else losses
        # A call of the module, since compilation and sharding change what a call of a module does.
        return self(x, losses), losses.means()
