"""Sizes of training images that change by epoch or by step."""

from collections import Counter
from types import SimpleNamespace

import pytest

from datamodules.digits import Digits
from datamodules.sizes import SizeSchedule
from datamodules.transforms import Augment


def make_data(rank=0, world_size=1, workers=0, **augment):
    data = Digits(image_size=16, batch_size=64 // world_size, augment={"scale": [0.5, 1.0], **augment},
                  num_workers=workers, seed=3)  # fmt: skip
    data.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        max_epochs=6, global_rank=rank, world_size=world_size, num_devices=1,
        strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu")),
    )  # fmt: skip
    return data


def sizes(loader, epoch):
    loader.set_epoch(epoch)
    return [tuple(batch["image"].shape[2:]) for batch in loader]


def test_stages_have_equal_length_and_end_with_the_last_size():
    schedule = SizeSchedule([8, 12, (12, 16)], False, 0, 7)
    assert [schedule(epoch, 5) for epoch in range(7)] == [8, 8, 8, 12, 12, (12, 16), (12, 16)]


def test_batches_have_the_size_of_their_epoch():
    loader = make_data(sizes=[8, [12, 16], 16]).train_dataloader()
    for epoch, size in ((0, (8, 8)), (1, (8, 8)), (2, (12, 16)), (5, (16, 16))):
        assert set(sizes(loader, epoch)) == {size}
    # Evaluation and a run without sizes have the data's.
    data = make_data(sizes=[8])
    assert next(iter(data.val_dataloader()))["image"].shape[2:] == (16, 16)
    assert set(sizes(make_data().train_dataloader(), 0)) == {(16, 16)}


def test_drawn_sizes_are_those_of_all_ranks_of_workers_and_of_a_resumed_epoch():
    arguments = {"sizes": [8, 12, 16], "size_by": "step"}
    whole = sizes(make_data(**arguments).train_dataloader(), 1)
    assert sizes(make_data(rank=1, world_size=2, **arguments).train_dataloader(), 1) == whole
    assert sizes(make_data(workers=1, **arguments).train_dataloader(), 1) == whole
    assert len(whole) == 19 and len(Counter(whole)) == 3
    assert whole != sizes(make_data(**arguments).train_dataloader(), 2)
    resumed = make_data(**arguments).train_dataloader()
    resumed.load_state_dict({"epoch": 1, "batches": 7})
    assert [tuple(batch["image"].shape[2:]) for batch in resumed] == whole[7:]


@pytest.mark.parametrize(("values", "says"), [({"sizes": []}, "one or more"), ({"size_by": "step"}, "null without")])
def test_wrong_sizes_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Augment.from_config(values)
