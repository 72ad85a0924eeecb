"""Making reference vectors."""

import pytest
import torch

from models.reference import load_vector, record_vector
from scripts.make_vector import main
from tests.vectors import VECTOR_FILES
from tests.vectors.comparison import assert_reproduces
from tests.vectors.kinds import Net

NANO = "module=models.backbones.swin:swin_nano"


def make(tmp_path, *arguments, name="system__variant"):
    path = tmp_path / f"{name}.json.gz"
    main([*arguments, f"out={path}"])
    return path


def test_a_vector_of_our_own_net_is_reproduced(tmp_path):
    path = make(tmp_path, NANO, "input_shape=[2,3,32,32]", "kwargs.num_classes=10", "kwargs.depths=[1,1,2,1]")
    vector = load_vector(path)
    assert (vector["system"], vector["variant"]) == ("system", "variant")
    assert vector["kwargs"] == {"num_classes": 10, "depths": [1, 1, 2, 1]} and vector["source"].endswith("swin_nano")
    assert vector["outputs"]["logits"]["shape"] == [2, 10]
    assert_reproduces(Net("swin_nano", {"depths": (1, 1, 2, 1)}), vector)
    with pytest.raises(AssertionError):
        assert_reproduces(Net("swin_nano", {"depths": (1, 1, 2, 1), "window": 2}), vector)
    assert (
        make(tmp_path, NANO, "input_shape=[1,3,32,32]").read_bytes()
        == make(tmp_path, NANO, "input_shape=[1,3,32,32]").read_bytes()
    )


def test_a_stored_vector_is_made_again(tmp_path):
    stored = load_vector(VECTOR_FILES["halonet__halonet26t"])
    shape = ",".join(map(str, stored["input_shape"]))
    path = make(
        tmp_path,
        "module=timm.models.byoanet:halonet26t",
        f"input_shape=[{shape}]",
        f"source={stored['source']}",
        name="halonet__halonet26t",
    )
    vector = load_vector(path)
    made, expected = vector.pop("outputs")["logits"], stored.pop("outputs")["logits"]
    assert vector == stored and list(vector) == list(stored)
    assert list(made) == list(expected) and made["shape"] == expected["shape"]
    for key in ("mean", "std", "values"):
        assert torch.allclose(torch.tensor(made[key]), torch.tensor(expected[key]), rtol=1e-5, atol=1e-6)


class Toy(torch.nn.Module):
    """A module with every kind of tensor, and two outputs."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.table = torch.nn.Parameter(torch.ones(2, 2))
        self.register_buffer("mask", torch.full((4,), 7.0))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.norm(x) + self.table.sum(), self.get_buffer("mask").sum() * x[:, :1]


def test_weights_are_filled_and_computed_buffers_stay():
    module = Toy()
    vector = record_vector(module, [1, 3, 4, 4], system="toy", variant="all")
    as_built = {key: built for key, _, _, built in vector["state"]}
    assert as_built == {
        "table": False,
        "mask": True,
        "norm.weight": False,
        "norm.bias": False,
        "norm.running_mean": False,
        "norm.running_var": False,
        "norm.num_batches_tracked": True,
    }
    assert list(vector["outputs"]) == ["stage1", "stage2"] and vector["num_params"] == 4 + 6
    assert module.get_buffer("mask").eq(7).all() and module.norm.weight.ne(1).all()
    named = record_vector(module, [1, 3, 4, 4], system="toy", variant="all", output_names=["a", "b"])
    assert list(named["outputs"]) == ["a", "b"]
    with pytest.raises(ValueError, match="has 2 outputs, but 1 names"):
        record_vector(module, [1, 3, 4, 4], system="toy", variant="all", output_names=["a"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("models.backbones.swin", "module must be package.module:function"),
        ("models.backbones.nosuch:f", "cannot be imported: .*nosuch"),
        ("models.backbones.swin:swin_nanu", "has no 'swin_nanu'. Did you mean 'swin_nano'?"),
        ("models.hierarchical:imagenet_cfg", "returns dict, not a torch.nn.Module"),
    ],
)
def test_a_wrong_module_is_refused_in_one_line(module, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, f"module={module}", "input_shape=[1,3,32,32]")


def test_the_file_must_name_system_and_variant(tmp_path):
    with pytest.raises(ValueError, match=r"out must be a file <system>__<variant>\.json\.gz"):
        make(tmp_path, NANO, "input_shape=[1,3,32,32]", name="swin_nano")
