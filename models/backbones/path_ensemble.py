"""Path ensemble ViT (Chang et al., ICCV 2023, arXiv:2308.06548).

Paper: Revisiting Vision Transformer from the View of Path Ensemble. By the paper's abstract and introduction: there is
no public code, and no figures are known to us. The paper sees a plain ViT as an ensemble of paths of different length,
whose sum the classifier reads; it prunes paths, weighs them (EnsembleScale), and lets long paths teach short ones. The
further details are not known and our choice. The weights are per channel and start at 1, so that a fresh net is a DeiT,
and they change the sum for the classifier only. The outputs after a third and two thirds of the blocks are taught by KL
divergence to the net's scores.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models import plain
from models.backbones.deit import DeiT, deit_cfg
from ops.losses import Losses
from retinue.utils.suggestions import nearest

PATHS = ("mixer", "mlp")


class PathBlock(plain.Block):
    """Block that also sums the paths for the classifier: tokens (B, N, 2C) of the net's C channels and of the sum's C.

    The first block of a net takes tokens (B, N, C), which are the first path of the sum.

    Attributes:
        path_scale: Weights of the paths through the mixer and through the MLP in the sum, (2, C).
        embedding_scale: Weights of the first path in the sum, (C,); None except in the first block of a net.
        kept: Whether the paths through the mixer and through the MLP are in the sum.
    """

    embedding_scale: nn.Parameter | None
    kept: tuple[bool, ...] = (True, True)

    def __init__(self, dim: int, *args: Any, **kwargs: Any):
        super().__init__(dim, *args, **kwargs)
        self.path_scale = nn.Parameter(torch.ones(len(PATHS), dim))
        self.register_parameter("embedding_scale", None)

    def no_weight_decay(self) -> set[str]:
        return {"path_scale"}

    def forward(self, x: Tensor, size: Sequence[int], **context) -> Tensor:
        dim = self.path_scale.shape[1]
        x, total = (x, self.embedding_scale * x) if self.embedding_scale is not None else x.split(dim, dim=-1)
        mixed = self.drop_path(self.mix(self.norm1(x), size, **context))
        x = x + mixed
        fed = self.drop_path(self.mlp(self.norm2(x)))
        for path, scale, kept in zip((mixed, fed), self.path_scale, self.kept, strict=True):
            if kept:
                total = total + scale * path
        return torch.cat([x + fed, total], dim=-1)


class PathEnsemble(DeiT):
    """DeiT whose classifier, and whose maps, read a weighted sum of paths.

    Args:
        prune: Paths that are left out of the sum, as "<block>.mixer" or "<block>.mlp", such as ("0.mixer", "3.mlp").
        self_distillation: Teach the outputs after a third and two thirds of the blocks in training, by the auxiliary
            loss `self_distillation`. Their classifiers have no effect on the net's scores.
        **kwargs: Arguments of `PlainBackbone`.

    Raises:
        ValueError: A path of `prune` is unknown, or there are too few blocks for `self_distillation`.
    """

    block = PathBlock
    early_heads: nn.ModuleList

    def __init__(self, prune: Sequence[str] = (), self_distillation: bool = False, **kwargs):
        depth = sum(kwargs.get("depths", (12,)))
        if self_distillation and depth < 3:
            raise ValueError(f"self_distillation needs at least 3 blocks, not {depth}")
        # Indices of the blocks after which an output is taught
        self.taught = (depth // 3 - 1, 2 * depth // 3 - 1) if self_distillation else ()
        self.loss_weights = (("self_distillation", 0.1),) if self_distillation else ()
        super().__init__(**kwargs)
        blocks = cast(list[PathBlock], list(self.blocks))
        blocks[0].embedding_scale = nn.Parameter(torch.ones(self.embed_dim))
        known = [f"{i}.{path}" for i, path in product(range(depth), PATHS)]
        for name in prune:
            if name not in known:
                raise ValueError(f"prune names no path of the net: {name!r}.{nearest(name, known)}")
        for i, block in enumerate(blocks):
            block.kept = tuple(f"{i}.{path}" not in prune for path in PATHS)

    @property
    def optional_weights(self) -> set[str]:
        """Names of the weights that a file, such as DeiT's, may lack."""
        return {name for name in self.state_dict() if "_scale" in name or name.startswith("early_heads.")}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        device = next(self.parameters()).device
        heads = [nn.Linear(self.num_features, num_classes, device=device) for _ in self.taught if num_classes]
        self.early_heads = nn.ModuleList(heads)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
        """Run as `PlainBackbone.run`; the tokens after each block of `take` are the sums of the paths so far."""
        x, intermediates, sizes = super().run(*args, **kwargs)
        return x, [tokens.chunk(2, -1)[1] for tokens in intermediates], sizes

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x.chunk(2, -1)[1])

    def forward(self, x: Tensor, losses: Losses | None = None) -> Tensor:
        if losses is None or not self.early_heads:
            return super().forward(x, losses)
        x, intermediates, _ = super().run(x, self.taught, losses=losses)
        features = self.finish(x)
        self.compare_tokens(x, features, losses)
        logits = self.forward_head(features)
        target = logits.detach().log_softmax(-1)
        divergences = []
        for head, tokens in zip(self.early_heads, intermediates, strict=True):
            scores = head(self.global_pool(self.norm(tokens.chunk(2, -1)[0])))
            divergences.append(F.kl_div(scores.log_softmax(-1), target, log_target=True, reduction="batchmean"))
        losses.add("self_distillation", torch.stack(divergences).sum())
        return logits


default_cfgs = generate_default_cfgs({f"path_ensemble_{size}": deit_cfg("") for size in ("tiny", "small", "base")})


@register_model
def path_ensemble_tiny(pretrained: bool = False, **kwargs) -> PathEnsemble:
    return PathEnsemble.build("path_ensemble_tiny", pretrained, **{"dim": 192, "heads": 3} | kwargs)


@register_model
def path_ensemble_small(pretrained: bool = False, **kwargs) -> PathEnsemble:
    return PathEnsemble.build("path_ensemble_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def path_ensemble_base(pretrained: bool = False, **kwargs) -> PathEnsemble:
    return PathEnsemble.build("path_ensemble_base", pretrained, **kwargs)
