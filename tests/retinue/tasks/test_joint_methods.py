"""Joint-embedding methods: gradients, teachers, schedules, and two processes (gloo, CPU) like one."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from retinue.tasks.methods.method import Method
from retinue.tasks.methods.moco import MoCo
from tests.retinue.tasks.joint_methods import METHODS, batch_of, build


def outcome(name: str, method: Method) -> dict[str, torch.Tensor]:
    """Return the gradients after a backward pass, and the state after the step's end."""
    gradients = {f"{key}.grad": p.grad for key, p in method.named_parameters() if p.grad is not None}
    method.after_step(0.25)
    return gradients | {key: value for key, value in method.state_dict().items() if value.is_floating_point()}


def one_process(name: str) -> dict[str, torch.Tensor]:
    method = build(name)
    loss = method(batch_of(name), 0.25)["loss"]
    loss.backward()
    return {"loss": loss.detach()} | outcome(name, method)


def train(rank: int, folder: str) -> None:
    """Run each method on half of the images in one of two processes, and write the first one's outcomes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcomes = {}
    for name in METHODS:
        method = build(name)
        batch = batch_of(name)
        own = {"views": [{"image": view["image"][rank::2]} for view in batch["views"]]}
        wrapped = DistributedDataParallel(method)
        loss = wrapped(own, 0.25)["loss"]
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        outcomes[name] = {"loss": mean / 2} | outcome(name, method)
    if rank == 0:
        torch.save(outcomes, f"{folder}/outcomes.pt")
    # Gloo's thread may still hold the last sum, and it would wait for Python, which waits for the thread's end.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("ranks")
    spawn(train, (str(folder),), nprocs=2)
    return torch.load(folder / "outcomes.pt", weights_only=True)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name, two_processes):
    single = one_process(name)
    assert set(single) == set(two_processes[name])
    for key, value in single.items():
        error = (two_processes[name][key] - value).norm() / value.norm().clamp_min(1e-3)
        assert error < 1e-4, (key, float(error))


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_that_learns_gets_a_gradient(name):
    method = build(name)
    method(batch_of(name), 0.25)["loss"].backward()
    learning = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert learning and all(p.grad is not None and p.grad.any() for p in learning.values())


@pytest.mark.parametrize("name", METHODS)
def test_an_evaluation_changes_nothing(name):
    method = build(name).eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method(batch_of(name), 1.0)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


class Dropping(nn.Module):
    """Backbone with dropout and batch norm."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward_features(self, x):
        return self.drop(self.norm(self.stem(x)))

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3))


@pytest.mark.parametrize("name", ["dino", "moco_v3"])
def test_teachers_drop_nothing_and_normalise_by_the_batch(name):
    method = build(name, Dropping()).train()
    teacher = method.backbone if name == "dino" else method.teacher["backbone"]
    assert not teacher.drop.training and teacher.norm.training
    method.eval()
    assert not teacher.norm.training


@pytest.mark.parametrize("name", ["dino", "moco_v3"])
def test_the_teacher_follows_with_the_momentum_of_the_moment(name):
    method = build(name)
    student, teacher = (
        (method.student["backbone"], method.backbone) if name == "dino"
        else (method.backbone, method.teacher["backbone"])
    )  # fmt: skip
    method(batch_of(name), 0.0)
    assert torch.equal(teacher.stem.weight, student.stem.weight)
    before = teacher.stem.weight.clone()
    with torch.no_grad():
        student.stem.weight.add_(1.0)
    method.after_step(0.5)
    # Half way, the momentum is half way from 0.9 to 1.
    torch.testing.assert_close(teacher.stem.weight, before + 0.05)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_dino_center_is_the_running_mean_of_the_teacher():
    method = build("dino")
    batch = batch_of("dino")
    method(batch, 0.0)
    images = torch.cat([view["image"] for view in batch["views"][:2]])
    mean = method.head(method.features(images)).mean(0)
    assert not method.center.any()
    method.after_step(0.0)
    torch.testing.assert_close(method.center, 0.1 * mean.detach())


def test_dino_schedules():
    method = build("dino")
    assert [round(method.temperature_at(epoch / 4), 6) for epoch in range(4)] == [0.04, 0.055, 0.07, 0.07]
    head = {"params": method.student["head"].parameters(), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": method.student["backbone"].parameters()}, head], weight_decay=0.04)
    prototypes = method.student["head"].prototypes.parametrizations.weight.original1
    decays = []
    for step in range(8):
        method(batch_of("dino"), step / 8)["loss"].backward()
        method.before_step(optimizer, step / 8)
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
        # Two steps are one epoch.
        assert (prototypes.grad is None) == (step < 2)
        optimizer.zero_grad()
    assert decays[0] == [pytest.approx(0.04), 0.0] and decays[4] == [pytest.approx(0.22), 0.0]
    assert all(low < high for (low, _), (high, _) in pairwise(decays))


def test_moco_v3_keeps_the_patch_embedding():
    arguments: dict = {**METHODS["moco_v3"][1], "freeze_stem": True}
    method = MoCo(build("vicreg").backbone, image_size=(16, 16), in_chans=3, views=(), **arguments)
    assert not any(p.requires_grad for p in method.backbone.parameters())


@pytest.mark.parametrize("wrong", [{"temperature": "cold"}, {"temperature": -1.0}, {"limits": (1.0, 0.5)}])
def test_wrong_temperatures_are_refused(wrong):
    method, arguments = METHODS["simclr"]
    with pytest.raises(ValueError, match=f"method.{next(iter(wrong))} must be"):
        method(build("vicreg").backbone, image_size=(16, 16), in_chans=3, views=(), **arguments | wrong)
