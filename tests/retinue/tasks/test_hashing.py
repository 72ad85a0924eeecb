"""Codes, figures, scores and losses of hashing against their definitions."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from ops.attention.full import FullAttention
from retinue.evaluation.hash_codes import average_precisions, learn_codes
from retinue.tasks.hashing import Hashing, make_head, mask_patches, patch_scores

RECIPE = {
    "loss": "ce", "bce_target_threshold": None, "augment": {"label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0},
    "optimizer": {"name": "adamw"}, "schedule": {"kind": "cosine"},
}  # fmt: skip
TEACHER = {"name": "deit_tiny", "weights": None, "patch": 4, "depths": [2], "img_size": 16}


def test_codes_separate_the_classes():
    labels = np.random.default_rng(0).integers(6, size=300)
    codes = learn_codes(labels, 6, 16, seed=1)
    assert codes.shape == (300, 16) and set(np.unique(codes)) == {-1, 1}
    np.testing.assert_array_equal(codes, learn_codes(labels, 6, 16, seed=1))
    truth = np.eye(6)[labels]
    assert (LinearRegression().fit(codes, truth).predict(codes).argmax(1) == labels).mean() == 1
    distance = (16 - codes.astype(int) @ codes.T.astype(int)) / 2
    same = labels[:, None] == labels
    assert distance[same].mean() < 0.25 * distance[~same].mean()


def test_average_precision_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    codes, database = rng.choice([-1, 1], (9, 8)).astype(np.int8), rng.choice([-1, 1], (70, 8)).astype(np.int8)
    labels, database_labels = rng.integers(4, size=9), rng.integers(3, size=70)
    labels[0] = 3
    values = average_precisions(codes, labels, database, database_labels)
    assert np.isnan(values[labels == 3]).all()
    for value, code, label in zip(values, codes, labels, strict=True):
        if label < 3:
            distance = (code != database).sum(1)
            assert value == pytest.approx(average_precision_score(database_labels == label, -distance))


def test_patch_scores_are_those_of_loops():
    torch.manual_seed(0)
    mixer = FullAttention(12, 3).double()
    x, extra = torch.randn(2, 2, 3, 12, dtype=torch.float64), torch.randn(2, 1, 12, dtype=torch.float64)
    scores = patch_scores(mixer, x, extra)
    tokens = torch.cat([extra, x.flatten(1, 2)], 1)
    for b in range(2):
        q, k, v = mixer.qkv(tokens[b]).view(7, 3, 3, 4).permute(1, 2, 0, 3)  # (heads, N, 4) each
        for n in range(1, 7):
            attention, norms = [], []
            for h in range(3):
                weights = (q[h] @ k[h].T / math.sqrt(4)).softmax(1)
                attention.append(weights[0, n].item())
                norms.append((weights[n] @ v[h]).norm().item())
            expected = sum(a * norm / (sum(norms) + 1e-8) for a, norm in zip(attention, norms, strict=True))
            assert scores[b].flatten()[n - 1].item() == pytest.approx(expected, rel=1e-9)


def test_the_patches_with_the_highest_scores_are_masked_where_they_stand():
    scores = torch.tensor([[[0.1, 0.9, 0.2], [0.3, 0.0, 0.8]]])
    masked = mask_patches(torch.ones(1, 3, 8, 12), scores, 2)
    expected = torch.ones(8, 12)
    expected[0:4, 4:8] = expected[4:8, 8:12] = 0
    assert torch.equal(masked, expected.expand(1, 3, 8, 12))
    assert not mask_patches(torch.ones(1, 3, 8, 12), scores, 10).any()


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(768, 5))
        self.head_hash = make_head(5, 8)

    def forward(self, image):
        return self[1](self[0](image))


def make(**changes):
    settings = {"bits": 8, "class_weight": 0.1, "transfer_weight": 1.0, "masked_patches": 4, "teacher": TEACHER}
    recipe = changes.pop("recipe", RECIPE)
    return Hashing(Net(), recipe, num_classes=5, channels_last=False, **(settings | changes))


def test_the_loss_is_its_definition_and_both_nets_learn():
    torch.manual_seed(0)
    task, image, label = make(), torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    codes = torch.from_numpy(learn_codes(label.numpy(), 5, 8, 0))
    task.targets = codes
    index = torch.tensor([3, 0, 5, 1, 2, 4])
    batch = {"image": image[index], "label": label[index], "index": index}
    task._trainer = None
    task.track = lambda *_, **__: None
    loss = task.training_step(batch, 0)
    loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    partner, target = task.partner, codes[index].float()
    assert partner is not None
    head, partner_head = task.model.get_submodule("head_hash"), partner.get_submodule("head_hash")
    with torch.no_grad():
        logits, (partner_logits, scores) = task.model(batch["image"]), task.score_patches(batch["image"])
        code, partner_code = head(logits), partner_head(partner_logits)
        masked = task.model(mask_patches(batch["image"], scores, 4))
        student = 0.1 * (F.cross_entropy(logits, batch["label"]) + F.cross_entropy(masked, batch["label"]))
        student = student + ((code - target) ** 2).mean() + (1 - F.cosine_similarity(code, partner_code)).mean()
    partner_logits, _ = task.score_patches(batch["image"])
    own = F.cross_entropy(partner_logits, batch["label"])
    own = own + ((partner_head(partner_logits) - target) ** 2).mean()
    torch.testing.assert_close(loss, student + own)
    # The teacher learns by its own loss alone.
    gradients = {name: p.grad.clone() for name, p in partner.named_parameters() if p.grad is not None}
    partner.zero_grad()
    own.backward()
    for name, parameter in partner.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"name": "resnet18", "weights": None}}, "task.teacher.name=resnet18 must be a ViT-shaped net"),
        ({"teacher": {"name": "deit_tny", "weights": None}}, "no net is called 'deit_tny'"),
        (
            {"recipe": RECIPE | {"augment": RECIPE["augment"] | {"mixup": 0.8}}},
            "task=hashing needs images of one class",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes, says):
    with pytest.raises(ValueError, match=says):
        make(**changes)
