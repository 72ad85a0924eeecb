"""Task of hashing: a classifier that also learns binary codes for retrieval, as EET trains them.

Paper: EET: efficient and effective vision transformer for fine-grained retrieval. Written after the authors'
repository, WhiteJiang/EET. The task trains any net; EET's student prunes tokens, as `model.reduction=eet` does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier_rows import ClassifierRows
from models.factory import build
from models.hierarchical import init_weights
from models.plain import PlainBackbone
from models.weights import load_weights
from ops.attention.full import FullAttention
from ops.functional import split_heads
from retinue.evaluation.hash_codes import average_precisions, learn_codes, write_codes
from retinue.evaluation.statistics import draw_images, percentile_intervals
from retinue.tasks.classification import Classification
from retinue.tasks.optimization import create_optimizer, create_schedule

# Smallest sum of the norms of the heads by which a norm is divided.
EPS = 1e-8


class Hashing(Classification):
    """Classification whose logits are mapped to binary codes; the further figure is mAP of retrieval by these codes.

    The loss is `class_weight` * cross-entropy + the mean squared distance of the code from the target code that
    `learn_codes` gives the image. With a teacher, a ViT-shaped net that learns at the same time by cross-entropy and
    target codes, the student also sees each image without the `masked_patches` patches that matter most to the teacher
    (a second cross-entropy), and `transfer_weight` * (1 - cosine of the student's and the teacher's code) is added.

    The database of the retrieval are the target codes of the training images; the queries are validation or test
    images.

    Args:
        model: As `build_net` returns it: a classifier with the layer `head_hash` from logits to codes.
        recipe: As in `Classification`, without mixing.
        bits: Length of a code.
        class_weight: Weight of the student's cross-entropies.
        transfer_weight: Weight of the distance from the teacher's code.
        masked_patches: Number of patches that are masked.
        teacher: `name` (a ViT-shaped net in timm's registry; null for none), `weights` (a file, of which another
            classifier is left out; null for initial weights), and further arguments of the net.
        num_classes: Number of classes.
        kwargs: Further arguments of `Classification`.

    Raises:
        ValueError: The recipe mixes images, the teacher has no class token or its last block no full attention, or an
            argument of `Classification` is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping,
        *,
        bits: int,
        class_weight: float,
        transfer_weight: float,
        masked_patches: int,
        teacher: Mapping[str, Any],
        num_classes: int,
        **kwargs,
    ):
        super().__init__(model, recipe, num_classes=num_classes, distillation={"teacher": None}, **kwargs)
        if recipe["augment"]["mixup"] or recipe["augment"]["cutmix"]:
            raise ValueError("task=hashing needs images of one class: recipe.augment.mixup=0 recipe.augment.cutmix=0")
        self.bits, self.masked_patches = bits, masked_patches
        self.class_weight, self.transfer_weight = class_weight, transfer_weight
        self.partner: PlainBackbone | None = None
        self.partner_weights: str | None = teacher["weights"]
        if teacher["name"]:
            arguments = {key: value for key, value in teacher.items() if key not in ("name", "weights")}
            self.partner = make_teacher(teacher["name"], num_classes, bits, arguments)
        # Target codes of the training images and their labels, once they are known.
        self.targets: Tensor | None = None
        self.database_labels = np.zeros(0, np.int64)
        # Codes and positions of this rank's images in the current validation or test, by batch.
        self._rank_codes: list[tuple[np.ndarray, np.ndarray]] = []
        # Logits of the current batch of a validation or test.
        self._logits: Tensor | None = None
        self._codes = np.zeros((0, bits), np.int8)

    @staticmethod
    def build_net(cfg: Any, datamodule: Any) -> nn.Module:
        net = Classification.build_net(cfg, datamodule)
        net.head_hash = make_head(datamodule.num_classes, cfg.task.bits)
        return net

    def start_from(self, weights: str, drop_classifier: bool, classifier_rows: ClassifierRows | None = None) -> None:
        head = self.model.head_hash
        # Weights of a classifier have no such layer.
        del self.model.head_hash
        super().start_from(weights, drop_classifier, classifier_rows)
        self.model.head_hash = head

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.partner is not None and self.partner_weights:
            head = self.partner.head_hash
            del self.partner.head_hash
            load_weights(self.partner, self.partner_weights, drop_classifier=True)
            self.partner.head_hash = head

    def learn_targets(self, datamodule: Any) -> None:
        """Compute the target codes of the training images, which follow from their labels and the seed."""
        if self.targets is None:
            labels = self.database_labels = datamodule.images("train").labels
            codes = learn_codes(labels, self.num_classes, self.bits, datamodule.seed)
            self.targets = torch.from_numpy(codes).to(self.device)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.learn_targets(self.trainer.datamodule)  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.model, self.recipe)
        if self.partner is not None:
            for group in create_optimizer(self.partner, self.recipe).param_groups:
                optimizer.add_param_group(group)
        schedule = create_schedule(optimizer, self.recipe, self.steps_per_epoch())
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def forward(self, image: Tensor) -> Tensor:
        logits = self.model(image)
        if not self.training:
            self._logits = logits
        return logits

    def code(self, net: nn.Module, logits: Tensor) -> Tensor:
        """Return the codes (B, bits) of logits, before their signs are taken."""
        head: Any = net.head_hash
        return head(logits).float()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.targets is not None
        image, label, target = batch["image"], batch["label"], self.targets[batch["index"]].float()
        losses = {}
        if self.loss_weights:
            model: Any = self.model
            logits, losses = model.forward_with_losses(image)
        else:
            logits = self(image)
        code = self.code(self.model, logits)
        class_loss, code_loss = self.loss(logits, label), F.mse_loss(code, target)
        loss, figures = self.class_weight * class_loss + code_loss, {"code": code_loss}
        if self.partner is not None:
            partner_logits, scores = self.score_patches(image)
            partner_code = self.code(self.partner, partner_logits)
            masked = mask_patches(image, scores, self.masked_patches)
            transfer = 1 - F.cosine_similarity(code, partner_code.detach()).mean()
            loss = loss + self.class_weight * self.loss(self(masked), label) + self.transfer_weight * transfer
            # The teacher's own loss has no gradient for the student, nor the other way round.
            loss = loss + self.loss(partner_logits, label) + F.mse_loss(partner_code, target)
            figures["transfer"] = transfer
        for name, value in losses.items():
            loss = loss + self.loss_weights[name] * value
        self.track(loss, len(label), top1=(logits.argmax(1) == label).float().mean(), **figures, **losses)
        return loss

    def score_patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits (B, K), and how much each of its patches matters, (B, H, W)."""
        assert self.partner is not None
        mixer: Any = self.partner.blocks[-1].mixer
        inputs: list[tuple[Tensor, Tensor]] = []
        hook = mixer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
        try:
            logits = self.partner(image)
        finally:
            hook.remove()
        [(x, extra)] = inputs
        return logits, patch_scores(mixer, x.detach(), extra.detach())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self._keep_codes(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self._keep_codes(batch)

    def _keep_codes(self, batch: dict[str, Tensor]) -> None:
        assert self._logits is not None
        code = self.code(self.model, self._logits)
        self._rank_codes.append(
            (batch["index"].cpu().numpy(), np.where(code.cpu().numpy() >= 0, 1, -1).astype(np.int8))
        )

    def _gather_codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions (N,), sorted, and the codes (N, bits) of all ranks' images since the last call."""
        own, self._rank_codes = self._rank_codes, []
        parts = [part for of_rank in self.gather(own) for part in of_rank]
        index, codes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        _, first = np.unique(index, return_index=True)
        order = first[index[first] >= 0]
        return index[order], codes[order]

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        index, codes = self._gather_codes()
        precisions = self.precisions(codes, datamodule.images("val").labels[index])
        figures = {"val/code_map": float(np.nanmean(precisions))}
        self.val_figures |= figures
        self.log_dict(figures, logger=False)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        _, self._codes = self._gather_codes()

    predict_step = test_step
    on_predict_epoch_end = on_test_epoch_end

    def precisions(self, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the average precision of each query, (Q,), with the training images as the database."""
        assert self.targets is not None
        return average_precisions(codes, labels, self.targets.cpu().numpy(), self.database_labels)

    def test_figures(self, datamodule: Any) -> dict[str, Any]:
        assert self.predictions is not None
        self.learn_targets(datamodule)
        precisions = self.precisions(self._codes, self.predictions.label)
        known = precisions[np.isfinite(precisions)]
        observed = np.array([known.mean()])
        resampled = np.array([[draws @ known / len(known)] for draws in draw_images(len(known), 1000, 0)])
        [interval] = percentile_intervals(observed, resampled).tolist()
        figures = super().test_figures(datamodule)
        methods = figures["ci_methods"] | {"code_map": "percentile bootstrap over queries, 1000 resamples, seed 0"}
        return {"n": figures["n"], "code_map": float(observed[0]), "code_map_ci95": interval} | figures | {
            "ci_methods": methods
        }  # fmt: skip

    def write_report(self, folder: Path, datamodule: Any) -> None:
        """Write what `Classification` writes, and `codes.csv`."""
        super().write_report(folder, datamodule)
        self._write_codes(folder, datamodule)

    def write_predictions(self, folder: Path, datamodule: Any) -> None:
        """Write what `Classification` writes, and `codes.csv`."""
        super().write_predictions(folder, datamodule)
        self._write_codes(folder, datamodule)

    def _write_codes(self, folder: Path, datamodule: Any) -> None:
        assert self.predictions is not None
        names = datamodule.names("test")
        write_codes(folder / "codes.csv", self._codes, [names[index] for index in self.predictions.index])


def make_head(num_classes: int, bits: int) -> nn.Linear:
    """Return the layer from logits to codes, initialised as a ViT's layers."""
    head = nn.Linear(num_classes, bits)
    init_weights(head)
    return head


def make_teacher(name: str, num_classes: int, bits: int, arguments: Mapping[str, Any]) -> PlainBackbone:
    """Return a ViT-shaped net with the layer `head_hash`.

    Raises:
        ValueError: The net has no class token, or its last block has no full attention.
    """
    net = build(name, num_classes=num_classes, **arguments)
    mixer = net.blocks[-1].mixer if isinstance(net, PlainBackbone) else None
    if not (isinstance(net, PlainBackbone) and net.extra == 1 and type(mixer) is FullAttention):
        raise ValueError(
            f"task.teacher.name={name} must be a ViT-shaped net of Retinue's with a class token and full attention in "
            "its last block, such as deit_small"
        )
    net.head_hash = make_head(num_classes, bits)
    return net


def patch_scores(mixer: Any, x: Tensor, extra: Tensor) -> Tensor:
    """Return the content-based score of each patch in a block of full attention, (B, H, W).

    The score is the sum over the heads of the class token's attention to the patch, weighted by the share that the head
    has in the norms of the patch's outputs of all heads.

    Args:
        mixer: The op, with `qkv`, `num_heads` and `softmax`.
        x: Its input map (B, H, W, C).
        extra: The class token that it receives, (B, 1, C).
    """
    with torch.no_grad():
        tokens = torch.cat([extra, x.flatten(1, 2)], 1)
        q, k, v = split_heads(mixer.qkv(tokens), 3 * mixer.num_heads).chunk(3, dim=1)
        weights = (q * mixer.softmax.scale(k.shape[-2]) @ k.transpose(-2, -1)).softmax(-1)
        norms = (weights @ v)[:, :, 1:].norm(dim=-1)  # (B, heads, N)
        shares = norms / (norms.sum(1, keepdim=True) + EPS)
        return (weights[:, :, 0, 1:] * shares).sum(1).unflatten(1, x.shape[1:3])


def mask_patches(image: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return images whose patches of the highest scores are 0, the mean colour.

    The authors' code exchanges the rows and columns of the patches; here a patch is masked where it stands.

    Args:
        image: (B, C, h, w), normalised.
        scores: (B, H, W), a score for each patch.
        count: Number of patches to mask in each image, at most H * W.
    """
    flat = scores.flatten(1)
    chosen = flat.topk(min(count, flat.shape[1]), dim=1).indices
    kept = torch.ones_like(flat).scatter(1, chosen, 0).view(len(scores), 1, *scores.shape[1:])
    return image * F.interpolate(kept.to(image.dtype), image.shape[-2:], mode="nearest")
