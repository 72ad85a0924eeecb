"""PIDray's layout, and its three test sets alone and together."""

import json

import pytest
from PIL import Image

from datamodules.coco import PIDray
from tests.datamodules.test_detection import HEIGHT, WIDTH, content


def write_pidray(root):
    """Write PIDray's archive with the same annotations in each file, and images that differ by their names."""
    (root / "annotations").mkdir()
    for name in ("train", "test_easy", "test_hard", "test_hidden"):
        truth, folder = content(), name.removeprefix("test_")
        (root / folder).mkdir()
        for image in truth["images"]:
            image["file_name"] = f"{folder}_{image['file_name']}"
            Image.new("RGB", (WIDTH, HEIGHT)).save(root / folder / image["file_name"])
        (root / f"annotations/xray_{name}.json").write_text(json.dumps(truth))
    return root


def make_pidray(root, test):
    return PIDray(root=str(root), image_size=[500, 500], test=test, num_workers=0)


def test_pidray_has_the_layout_of_its_archive(tmp_path):
    write_pidray(tmp_path)
    for test in ("easy", ["hidden"]):
        data = make_pidray(tmp_path, test)
        name = data.test_sets[0]
        assert data.names("test") == data.names("val") == [f"{name}_{id:06d}.png" for id in (12, 5, 9, 30, 31)]
        assert data.names("train")[0] == "train_000012.png" and data.sets("test") == {}
        assert data.images("test").ids.tolist() == [12, 5, 9, 30, 31]
    with pytest.raises(ValueError, match=r"data\.test must be easy, hard or hidden, .*'hiden'\. Did .*'hidden'"):
        make_pidray(tmp_path, "hiden")
    with pytest.raises(ValueError, match=r"each set once, not \['easy', 'easy'\]"):
        make_pidray(tmp_path, ["easy", "easy"])


def test_pidrays_test_sets_are_joined_with_new_numbers(tmp_path):
    data = make_pidray(write_pidray(tmp_path), ["easy", "hard", "hidden"])
    images, one = data.images("test"), make_pidray(tmp_path, "hidden").images("test")
    assert data.sets("val") == data.sets("test") == {"easy": range(5), "hard": range(5, 10), "hidden": range(10, 15)}
    assert data.sets("train") == {} and len(data.images("train")) == 4
    assert data.names("test")[10:] == [f"hidden/{one.name(i)}" for i in range(5)]
    assert images[14]["image"].shape == (HEIGHT, WIDTH, 3)
    truth, expected = images.truth, one.truth
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"]) == 30
    assert [image["id"] for image in truth["images"]] == [*range(15)]
    # The last set's objects are those of its own file, at new numbers of images.
    position = {id: i for i, id in enumerate(one.ids.tolist(), 10)}
    for joined, own in zip(truth["annotations"][20:], expected["annotations"], strict=True):
        assert joined == own | {"id": joined["id"], "image_id": position[own["image_id"]]}
