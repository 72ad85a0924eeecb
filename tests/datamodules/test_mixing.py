"""MaskMix by its definition, and what a mixed batch says about its mixing."""

import random

import numpy as np
import pytest
import torch

from datamodules.batch import BatchTransform, normalise
from datamodules.digits import Digits
from datamodules.images import ArrayImages
from datamodules.mixing import MaskMix, mix_in_cells
from datamodules.transforms import Augment, TrainTransform
from tests.datamodules.test_batch import MEAN, STD, make_batch

MASKS = MaskMix(cell=6, prob=1.0)
MIXES = {
    "mixup": Augment(mixup=1.0),
    "cutmix": Augment(cutmix=1.0),
    "maskmix": Augment(maskmix=MASKS, cutmix=1.0),
    None: Augment(mixup=1.0, mixup_prob=0.0),
}


@pytest.mark.parametrize("kind", MIXES)
def test_a_batch_says_how_it_was_mixed(kind):
    batch = make_batch() | {"label": torch.arange(6)}
    out = BatchTransform(MEAN, STD, 6, MIXES[kind])(batch)
    whole, mix = normalise(batch["image"], torch.tensor(MEAN), torch.tensor(STD)), out["mix"]
    assert mix.kind == kind and mix.own.shape == (6, 1, 20, 24)
    for i in range(6):
        j = int(mix.partner[i])
        torch.testing.assert_close(out["image"][i], mix.own[i] * whole[i] + (1 - mix.own[i]) * whole[j])
        expected = torch.zeros(6)
        expected[i] += mix.share
        expected[j] += 1 - mix.share
        torch.testing.assert_close(out["target"][i], expected)
    if kind != "maskmix":
        torch.testing.assert_close(mix.own.mean((1, 2, 3)), torch.full((6,), mix.share))


def test_maskmix_keeps_as_many_whole_cells_of_each_image_at_random_places():
    image = torch.randn(5, 3, 20, 24)
    whole = image.clone()
    np.random.seed(3)
    torch.manual_seed(3)
    mix = mix_in_cells(image, MASKS)
    np.random.seed(3)
    kept = int(np.ceil(16 * np.random.beta(1.0, 1.0)))
    assert mix.share == kept / 16 and 0 < kept < 16
    assert sorted(mix.partner.tolist()) == list(range(5))
    choices = []
    for i in range(5):
        choice = set(np.random.permutation(16)[:kept].tolist())
        choices.append(choice)
        for y in range(20):
            for x in range(24):
                source = i if y // 6 * 4 + x // 6 in choice else int(mix.partner[i])
                assert torch.equal(image[i, :, y, x], whole[source, :, y, x])
    assert len({tuple(sorted(choice)) for choice in choices}) > 1


def test_maskmix_takes_its_share_of_the_batches_and_cutmix_the_others():
    transform = BatchTransform(MEAN, STD, 4, Augment(maskmix=MaskMix(cell=6, prob=0.25), cutmix=1.0))
    kinds = [transform(make_batch(seed=seed))["mix"].kind for seed in range(200)]
    assert 30 < kinds.count("maskmix") < 70 and kinds.count("cutmix") == 200 - kinds.count("maskmix")


def test_settings_of_maskmix_are_checked():
    assert Augment.from_config({"maskmix": {"cell": 8}}).maskmix == MaskMix(cell=8)
    with pytest.raises(ValueError, match=r"augment.maskmix has no 'cells'. Did you mean 'cell'"):
        Augment.from_config({"maskmix": {"cells": 8}})
    with pytest.raises(ValueError, match=r"augment.maskmix must be alpha above 0"):
        Augment.from_config({"maskmix": {"alpha": 0.0}})
    with pytest.raises(ValueError, match=r"maskmix.cell=56 is not less than the image size, 32"):
        TrainTransform(Augment(maskmix=MaskMix()), 32)


AUGMIX = {"auto_augment": "augmix-m3-w3", "jsd": 12.0}


def test_augmix_views_belong_to_the_same_crop_and_the_image_stays_clean():
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    sample = {"image": np.repeat(np.repeat(picture, 2, 0), 2, 1)}
    augment = {"pad_crop": 2, "hflip": 0.5}
    plain, views = (TrainTransform(Augment.from_config(a), (36, 44)) for a in (augment, augment | AUGMIX))
    np.random.seed(1)
    random.seed(1)
    clean = plain(sample)["image"]
    outputs = []
    for _ in range(2):
        np.random.seed(1)
        random.seed(1)
        outputs.append(views(sample))
    for key in ("image", "altered"):
        assert np.array_equal(outputs[0][key], outputs[1][key])
    assert np.array_equal(outputs[0]["image"], clean)
    first, second = outputs[0]["altered"]
    assert first.shape == clean.shape and not np.array_equal(first, second) and not np.array_equal(first, clean)


def test_views_are_normalised_view_by_view():
    batch = make_batch()
    batch["altered"] = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (6, 2, 20, 24, 3), np.uint8))
    out = BatchTransform(MEAN, STD, 4, Augment.from_config(AUGMIX))(batch)
    assert out["image"].shape == (6, 3, 20, 24) and out["altered"].shape == (12, 3, 20, 24)
    for view in range(2):
        for i in range(6):
            pixels = batch["altered"][i, view].permute(2, 0, 1) / 255
            expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            torch.testing.assert_close(out["altered"][6 * view + i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_augment": None}, "augment.auto_augment must be AugMix"),
        ({"mixup": 0.8}, "augment.jsd must be null with mixup"),
        ({"maskmix": {"cell": 4}}, "augment.jsd must be null with mixup"),
    ],
)
def test_views_need_augmix_and_labels_of_one_image(change, message):
    with pytest.raises(ValueError, match=message):
        Augment.from_config(AUGMIX | change)


class FewDigits(Digits):
    def load(self, split):
        images = super().load(split)
        return ArrayImages(images.images[:40], images.labels[:40], split)


@pytest.mark.parametrize("kind", ["maskmix", "augmix", "label maps"])
def test_a_resumed_loader_gives_the_same_batches(kind, tmp_path):
    augment = {"maskmix": {"cell": 4, "prob": 0.5}, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1"}
    arguments = {"augment": AUGMIX if kind == "augmix" else augment, "num_workers": 0, "image_size": 16, "seed": 3}
    if kind == "label maps":
        (tmp_path / "train").mkdir()
        for i in range(40):
            torch.save(torch.full((2, 1, 2, 2), i % 10), tmp_path / f"train/{i:05d}.pt")
        arguments["token_maps"] = str(tmp_path)

    def batches(done):
        data = FewDigits(batch_size=8, **arguments)
        loader = data.train_dataloader()
        loader.load_state_dict({"epoch": 1, "batches": done})
        return [data.on_after_batch_transfer(batch, 0) for batch in loader]

    whole, rest = batches(0), batches(3)
    assert (len(whole), len(rest)) == (5, 2)
    for one, other in zip(whole[3:], rest, strict=True):
        assert one.keys() == other.keys() and ("altered" in one, "map_view" in one) == (
            kind == "augmix",
            kind == "label maps",
        )
        for key in one.keys() - {"mix", "seed"}:
            assert torch.equal(one[key], other[key])
        assert kind == "augmix" or torch.equal(one["mix"].own, other["mix"].own)
