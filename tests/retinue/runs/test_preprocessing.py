"""Images are preprocessed as the weights of a net were trained, unless a value is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from models import load_weights
from models.preprocessing import net_preprocessing
from retinue.results import reproduce
from retinue.results.paper_table import read_rows
from retinue.results.papers import read_paper
from retinue.runs.config import register_resolvers, with_run
from retinue.runs.help import list_choices
from retinue.runs.identity import fingerprint, identity, run_folder
from retinue.runs.preprocessing import resolve_preprocessing, resolved_data
from retinue.runs.training import build_data
from retinue.tasks.classification import Classification
from retinue.tasks.distillation import Teacher
from retinue.utils.arithmetic import ceil_div
from retinue.utils.paths import CONF
from retinue.utils.sizes import model_name, size_pixels
from tests.imagenet_folder import make_imagenet_folder
from tests.retinue.runs.cli import SMALL, SWIN, result

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# One net for each way in which timm's families differ: mean and deviation, crop mode, crop, interpolation, size.
FEW = (
    "test_vit", "test_resnet", "mobilevit_xxs", "vit_tiny_patch16_224.augreg_in21k", "eva02_tiny_patch14_336",
    "coatnet_rmlp_nano_rw_224", "tf_efficientnetv2_b0", "volo_d4_448",
)  # fmt: skip
OURS = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("models.")]
# 50 names over all of timm's families. NaFlexViT takes patches rather than images.
PUBLISHED = [
    name
    for name in timm.list_models(pretrained=True)
    if name.partition(".")[0] not in OURS and not name.startswith("naflexvit")
]
MANY = PUBLISHED[:: ceil_div(len(PUBLISHED), 50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of images of different kinds and sizes, in ImageNet's layout."""
    return make_imagenet_folder(tmp_path_factory.mktemp("imagenet"), per_class=6, broken=False)


def composed(*overrides: str, program: str = "train") -> Any:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program, overrides=["run_dir=run", "data.num_workers=0", *overrides])
    if program == "eval":
        return with_run(cfg, [], [])
    resolve_preprocessing(cfg)
    return cfg


def seen(cfg: Any) -> Tensor:
    """Return the first batch of validation images as the task of a config receives it."""
    datamodule = build_data(cfg)
    return datamodule.on_after_batch_transfer(next(iter(datamodule.val_dataloader())), 0)["image"]


def expected(net: nn.Module, folder: Path, names: Sequence[str]) -> Tensor:
    """Return the same images as timm's own transform gives them."""
    transform: Any = create_transform(**resolve_model_data_config(net))
    return torch.stack([transform(Image.open(folder / "val" / name).convert("RGB")) for name in names])


def compare(name: str, folder: Path) -> None:
    """Check the batches of an evaluation and of fine-tuning, and what a teacher sees, against timm's transform."""
    with torch.device("meta"):
        net = timm.create_model(name)
    overrides = ("model=timm", f"model.name={name}", "data=imagenet", f"data.root={folder}", "weights=net.pth")
    evaluated = composed(*overrides, "batch_size=6", program="eval")
    wanted = expected(net, folder, build_data(evaluated).names("test")[:6])
    torch.testing.assert_close(seen(evaluated), wanted, rtol=0, atol=2e-6)
    tuned = composed(*overrides, "recipe.batch_size=6")
    torch.testing.assert_close(seen(tuned), wanted, rtol=0, atol=2e-6)

    size = tuned.data.image_size
    other = composed(*overrides, "recipe.batch_size=6", "data.mean=[0.3,0.6,0.1]", "data.std=[0.25,0.5,1.0]")
    teacher = Teacher(teacher=name, weights="net.pth", mode="soft", alpha=0.5, temperature=1.0, num_classes=1000)
    received = teacher.see(seen(other), other.data.mean, other.data.std)
    assert size == other.data.image_size
    # Normalising twice rounds twice.
    torch.testing.assert_close(received, wanted, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("name", FEW)
def test_images_are_as_timm_gives_them(name, folder):
    compare(name, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_images_are_as_timm_gives_them_in_every_family(name, folder):
    compare(name, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_images_are_as_timm_gives_them_for_our_nets(name, folder):
    compare(name, folder)


def test_the_authors_crop_of_our_nets_is_used():
    for name in OURS:
        own = net_preprocessing(name)
        assert own == net_preprocessing(name, {"pretrained_cfg": timm.models.get_pretrained_cfg(name).to_dict()})  # pyright: ignore[reportOptionalMemberAccess]
        if name.startswith(("cswin_", "vitaev2_vsa_")):
            assert own["crop_pct"] == 0.9


def record(monkeypatch, step: str) -> list[tuple[Tensor, list[str]]]:
    """Record the images of each batch that `step` of the task receives, with the names of their files."""
    batches = []
    original = getattr(Classification, step)

    def recording(self: Any, batch: dict, batch_idx: int) -> Any:
        valid = batch["index"] >= 0
        names = self.trainer.datamodule.names("val")
        batches.append((batch["image"][valid].clone(), [names[i] for i in batch["index"][valid].tolist()]))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classification, step, recording)
    return batches


@pytest.mark.parametrize("name", ["test_vit", pytest.param("test_resnet", marks=pytest.mark.slow)])
def test_what_the_commands_see(name, folder, cli, monkeypatch):
    net = timm.create_model(name, num_classes=3)
    torch.save(net.state_dict(), "net.pth")
    data = ("data=imagenet", f"data.root={folder}", "data.num_workers=0", "trainer.accelerator=cpu")
    chosen = ("model=timm", f"model.name={name}", "weights=net.pth", *data)
    tested = record(monkeypatch, "test_step")
    outcome = cli("eval", *chosen, "hydra.run.dir=own")
    assert outcome.code == 0, outcome.err
    own = net_preprocessing(name)
    shown = "bicubic" if name == "test_vit" else "bilinear"
    assert f"preprocessing: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, crop 0.95, center, {shown}, 160 px" in outcome.out
    assert f"({name}'s own)" in outcome.out
    for images, names in tested:
        torch.testing.assert_close(images, expected(net, folder, names), rtol=0, atol=2e-6)

    # ImageNet's mean and deviation give other figures.
    tested.clear()
    values = (f"data.mean={IMAGENET_MEAN}".replace(" ", ""), f"data.std={IMAGENET_STD}".replace(" ", ""))
    assert cli("eval", *chosen, *values, "hydra.run.dir=imagenet").code == 0
    losses = [result(cli.folder / run)["metrics"]["test/loss"] for run in ("own", "imagenet")]
    assert abs(losses[0] - losses[1]) > 1e-4

    validated = record(monkeypatch, "validation_step")
    trained = cli(
        "train", *chosen, "recipe=small_data", "recipe.epochs=1", "recipe.batch_size=6", "logger=none",
        "trainer.limit_train_batches=1", "hydra.run.dir=tuned",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    for images, names in validated:
        torch.testing.assert_close(images, expected(net, folder, names), rtol=0, atol=2e-6)
    saved: Any = OmegaConf.load("tuned/config.yaml")
    assert {key: saved.data[key] for key in own} == own


def test_a_checkpoint_of_a_run_has_the_preprocessing_of_the_run(cli):
    assert cli.train("hydra.run.dir=first", "data.mean=[0.2,0.3,0.4]", "data.interpolation=bilinear").code == 0
    weights = "weights=first/checkpoints/best.ckpt"
    tuned = cli("train", *SWIN, *SMALL, weights, "data.image_size=null", "data.crop_pct=0.9", "hydra.run.dir=tuned")
    assert tuned.code == 0, tuned.err
    as_in_first = "mean 0.2 0.3 0.4, std 0.349 0.349 0.349, center, bilinear, 16 px (as in first)"
    assert f"preprocessing: {as_in_first}; crop 0.9 (given)\n" in tuned.out
    saved: Any = OmegaConf.load("tuned/config.yaml")
    assert (saved.data.mean, saved.data.interpolation, saved.data.image_size) == ([0.2, 0.3, 0.4], "bilinear", 16)
    # A null value on the command line is the run's value, too.
    assert cli("eval", "run=first", "hydra.run.dir=as_it_is").code == 0
    assert cli("eval", "run=first", "data.mean=null", "data.image_size=null", "hydra.run.dir=with_null").code == 0
    as_it_is, with_null = (result(cli.folder / name) for name in ("as_it_is", "with_null"))
    assert as_it_is["metrics"] == with_null["metrics"]
    assert as_it_is["config_sha256"] == with_null["config_sha256"]

    Path("first/config.yaml").write_text("data: [")
    error = cli("train", *SWIN, *SMALL, weights, "hydra.run.dir=refused").error
    assert "first/config.yaml, which says how the weights were trained, cannot be read" in error
    assert not Path("refused").exists()


def test_training_from_nothing_takes_the_datas_own_values_and_its_folder():
    cfg = composed("model=swin")
    own = cfg.data.own
    assert all(cfg.data[key] == own[key] for key in own)
    values = [f"data.{key}={OmegaConf.to_container(own)[key]}".replace(" ", "") for key in own]  # pyright: ignore
    given = composed("model=swin", *values)
    assert run_folder(given) == run_folder(cfg)
    # A saved config of an earlier version has values and no `own`.
    del given.data.own
    assert fingerprint(given) == fingerprint(cfg) and identity(given) == identity(cfg)


def test_the_identity_holds_the_values_of_the_weights():
    register_resolvers()
    choice = ("model=cswin", "data=imagenet", "data.root=/data", "weights=cswin.pth")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        is_open = compose("train", overrides=["run_dir=run", *choice])
    assert is_open.data.crop_pct is None and identity(is_open)["data"]["crop_pct"] == 0.9
    assert run_folder(is_open) == run_folder(composed(*choice)) != run_folder(composed(*choice, "data.crop_pct=0.875"))


def test_resolving_the_size_of_the_images_does_not_change_the_net():
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        datasets = [compose("train", overrides=["run_dir=run", f"data={name}"]).data for name in ("digits", "imagenet")]
    for name in list_choices("model"):
        model: Any = OmegaConf.load(CONF / "model" / f"{name}.yaml")
        for data in datasets:
            cfg = {"model": model, "data": data, "weights": "net.pth"}
            if name != "timm":
                before, after = size_pixels(data), size_pixels(resolved_data(cfg))
                assert model_name(model, after) == model_name(model, before)


@pytest.mark.parametrize(("paper", "net"), [("cswin", "cswin_tiny"), ("vsa", "vitaev2_vsa_s")])
def test_a_papers_table_is_reproduced_with_the_authors_crop(paper, net, monkeypatch):
    evaluated = []

    def evaluate(cfg: Any) -> dict[str, Any]:
        evaluated.append(cfg.data)
        return {"metrics": {"test/top1": 0.8, "test/top1_ci95": (0.7, 0.9), "test/n": 50_000}}

    monkeypatch.setattr(reproduce, "evaluate_here", evaluate)
    register_resolvers()
    row = next(row for row in read_rows(read_paper(paper), "variants") if row.facts.get("net") == net)
    reproduce.evaluate_weights(row, "net.pth", {"root": "/data"}, 8)
    reproduce.evaluate_weights(row, "net.pth", {"root": "/data", "crop_pct": 0.875, "image_size": 256}, 8)
    assert [(data.crop_pct, data.image_size) for data in evaluated] == [(0.9, 224), (0.875, 256)]


@pytest.mark.parametrize("name", ["resnet10t", "swin_nano"])
def test_grey_images_give_the_scores_of_three_equal_channels(name):
    torch.manual_seed(0)
    colour = timm.create_model(name, num_classes=4).eval()
    grey = timm.create_model(name, num_classes=4, in_chans=1).eval()
    loaded = load_weights(grey, colour.state_dict())
    assert len(loaded.resized) == 1
    image = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_grey_digits_are_fine_tuned_from_weights_for_colour_images(cli):
    torch.save(timm.create_model("test_resnet", num_classes=1000).state_dict(), "net.pth")
    tuned = cli(
        "train", "model=timm", "model.name=test_resnet", "weights=net.pth", "drop_classifier=true", "data.in_chans=1",
        *SMALL, "hydra.run.dir=tuned",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert (
        "preprocessing: mean 0.5, std 0.5, crop 0.95, center, bilinear (test_resnet's own); 16 px (given)" in tuned.out
    )


def test_grey_images_have_the_mean_over_the_channels():
    cfg = composed("model=timm", "model.name=resnet18", "data.in_chans=1", "weights=net.pth")
    assert cfg.data.mean == pytest.approx([sum(IMAGENET_MEAN) / 3])
    assert cfg.data.std == pytest.approx([sum(IMAGENET_STD) / 3])
    assert composed("data.in_chans=1").data.mean == pytest.approx([0.309])


@pytest.mark.parametrize(("data", "size"), [("scenes", [256, 320]), ("scenes_segmentation", [128, 160])])
def test_a_dense_net_takes_mean_and_deviation_of_the_weights_but_the_datas_image_size(data, size):
    cfg = composed("model=timm", "model.name=test_vit", f"data={data}", "weights=net.pth")
    assert (cfg.data.mean, cfg.data.std, cfg.data.image_size) == ([0.5] * 3, [0.5] * 3, size)
    assert "crop_pct" not in cfg.data
    cfg = composed("model=timm", "model.name=test_vit", f"data={data}")
    assert (cfg.data.mean, cfg.data.std, cfg.data.image_size) == (IMAGENET_MEAN, IMAGENET_STD, size)


def test_pretrained_weights_have_their_own_preprocessing_and_a_wrong_tag_is_an_error():
    pretrained = ("model=timm", "model.pretrained=true", "data=imagenet", "data.root=/data")
    assert composed(*pretrained, "model.name=mobilevit_xxs").data.std == [1.0, 1.0, 1.0]
    overlay = "+model.args.pretrained_cfg_overlay={crop_pct: 0.7}"
    assert composed(*pretrained, "model.name=mobilevit_xxs", overlay).data.crop_pct == 0.7
    with pytest.raises(
        ValueError, match=r"no weights are called 'resnet18\.a1_in2k'\. Did you mean 'resnet18\.a1_in1k'"
    ):
        composed(*pretrained, "model.name=resnet18.a1_in2k")


def test_a_teacher_sees_grey_images_and_its_only_size():
    images = torch.rand(2, 1, 96, 96)
    teacher = Teacher(teacher="test_vit", weights="net.pth", mode="soft", alpha=0.5, temperature=1.0, num_classes=10)
    received = teacher.see((images - 0.2) / 0.5, [0.2], [0.5])
    assert received.shape == (2, 3, 160, 160)
    any_size = Teacher(teacher="test_resnet", weights="x", mode="soft", alpha=0.5, temperature=1.0, num_classes=10)
    wanted = (images.expand(-1, 3, -1, -1) - 0.5) / 0.5
    torch.testing.assert_close(any_size.see((images - 0.2) / 0.5, [0.2], [0.5]), wanted)
