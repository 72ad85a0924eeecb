"""An error is one line with exit code 2, and leaves no files behind."""

import shutil

import pytest
import torch

from ops import backend
from tests.imagenet_folder import make_imagenet_folder
from tests.retinue.runs.cli import result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=bifromer"], "model=bifromer is not there. Did you mean 'biformer'? There are: agent,"),
        (["data=digit"], "data=digit is not there. Did you mean 'digits'?"),
        (["recipe=diet"], "recipe=diet is not there. Did you mean 'deit'?"),
        (
            ["experiment=biformer/tny_in1k"],
            "experiment=biformer/tny_in1k is not there. Did you mean 'biformer/tiny_in1k'",
        ),
        (["experiment=nothing"], "experiment=nothing is not there."),
        (["task=classify"], "task=classify is not there. Did you mean 'classification'?"),
        (["trainer.devces=2"], "there is no key 'trainer.devces' in the config. Did you mean 'trainer.devices'?"),
        (["recipe.optimizer.name=adamv"], "no optimiser is called 'adamv'. Did you mean 'adam"),
        (["model.size=tny"], "Did you mean 'tiny'?"),
        (["model=timm", "model.name=resnet5"], "Did you mean 'resnet50'?"),
        (["model.mixers=windw"], "no op is called 'windw'. Did you mean 'window'?"),
        (["model.mixers={name: window, windw: 3}"], "op 'window' takes no 'windw'. Did you mean 'window'?"),
        (["model.mixers=[window,full]"], "one for each of 4 stages, not 2"),
        (["recipe.augment.auto_augment=rnd-m9"], "augment.auto_augment='rnd-m9'"),
        (["recipe.loss=mse"], "recipe.loss must be ce or bce, not 'mse'"),
        (["trainer.precision=fp8"], "trainer.precision must be one of fp32, bf16, fp16, not 'fp8'"),
        (["trainer.devices=3"], "recipe.batch_size=32 (images a step, over all devices)"),
        (["trainer.devices=0"], "trainer.devices must be a whole number, 1 or more, not 0"),
        (["data=imagenet", "recipe=small_data"], "data.root=FOLDER"),
        (["data=imagenet", "recipe=small_data", "data.root=nowhere"], "data.root=nowhere is missing"),
        (["data=image_folder", "data.root=${oc.env:EMPTY}"], "no class folders in"),
        (["data.in_chans=2"], "data.in_chans must be 1 or 3, not 2"),
        (["weights=nowhere.pth"], "nowhere.pth"),
        (["task.distillation.teacher=resnet5"], "no net is called 'resnet5'. Did you mean 'resnet50'?"),
        (["task.distillation.teacher=resnet18", "task.distillation.mode=sft"], "must be soft or hard, not 'sft'"),
        (
            ["model=timm", "model.name=vit_tiny_patch16_224", "data.image_size=225"],
            "takes no images of 225 x 225 pixels",
        ),
        (["model=timm"], "model.name=resnet50"),
        (["ops.backend=tritn"], "ops.backend must be one of auto, torch, triton, not 'tritn'. Did you mean 'triton'?"),
        (["seed=0", "seed"], "seed"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_files(cli, arguments, message, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EMPTY", str(tmp_path_factory.mktemp("empty")))
    outcome = cli.train(*arguments)
    assert message in outcome.error
    assert cli.files() == []
    assert list(cli.folder.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_forced_kernels_that_cannot_run_are_an_error(cli, monkeypatch):
    # The value at the end of the test is the one before it.
    monkeypatch.setitem(backend._state, "backend", "auto")
    error = cli.train("ops.backend=triton").error
    assert "ops.backend=triton, but window_attention cannot run as a kernel: it needs a CUDA device, not cpu" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_the_machine_lacks_are_an_error(cli):
    error = cli.train("trainer=gpu", "trainer.devices=4", "trainer.accelerator=gpu").error
    assert "trainer.devices=4, but this machine has 0 GPUs; it can run with trainer=cpu" in error
    assert cli.files() == []


def test_an_environment_variable_shows_the_traceback(cli, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"trainer\.precision must be one of"):
        cli.train("trainer.precision=fp8")


def test_weights_for_another_number_of_channels_are_an_error(cli):
    assert cli.train("hydra.run.dir=grey", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]").code == 0
    outcome = cli("eval", "run=grey", "data.in_chans=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]")
    assert "grey/checkpoints/best.ckpt" in outcome.error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Save a checkpoint of Swin's nano size for ten classes, and return its path."""
    import timm

    path = tmp_path_factory.mktemp("trained") / "swin_nano.pth"
    torch.save(timm.create_model("swin_nano", num_classes=10).state_dict(), path)
    return path


def test_weights_that_do_not_fit_are_an_error(cli, trained, tmp_path_factory):
    swin = ("data=digits", "model=swin", "model.size=nano", "trainer.accelerator=cpu", "data.num_workers=0")
    assert cli("eval", *swin, f"weights={trained}").code == 0
    shutil.rmtree(cli.folder / "outputs")

    truncated = tmp_path_factory.mktemp("weights") / "truncated.pth"
    truncated.write_bytes(trained.read_bytes()[:10_000])
    assert str(truncated) in cli("eval", *swin, f"weights={truncated}").error

    page = truncated.with_name("page.pth")
    page.write_text("<!DOCTYPE html><html>Not found</html>")
    assert str(page) in cli("eval", *swin, f"weights={page}").error

    assert "does not fit BiFormer" in cli("eval", *swin[:1], "model=biformer", *swin[3:], f"weights={trained}").error

    root = make_imagenet_folder(tmp_path_factory.mktemp("imagenet"), classes=3, per_class=4, broken=False)
    three = cli("eval", "data=imagenet", f"data.root={root}", "data.image_size=32", *swin[1:], f"weights={trained}")
    assert "10" in three.error and "3" in three.error and "drop" in three.error
    assert cli.files() == []


def test_weights_that_would_execute_code_are_an_error(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil")

    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    torch.save({"model": Evil()}, folder / "evil.pth")
    outcome = cli("eval", "model=swin", "model.size=nano", "trainer.accelerator=cpu", f"weights={folder / 'evil.pth'}")
    assert "open" in outcome.error
    assert not (folder / "executed").exists()
    assert cli.files() == []


def test_an_evaluation_without_weights_is_an_error(cli):
    assert "give run=DIR, weights=FILE" in cli("eval", "model=swin").error
    assert "run=nowhere is no run folder" in cli("eval", "run=nowhere").error
    assert list(cli.folder.iterdir()) == []


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(cli):
    run = ("hydra.run.dir=run", "recipe.epochs=4", "recipe.schedule.warmup_epochs=0", "recipe.optimizer.name=sgd",
           "recipe.optimizer.eps=null", "checkpoint.every_steps=1")  # fmt: skip
    outcome = cli.train(*run, "recipe.optimizer.lr=1e12")
    assert "the loss is not finite at step " in outcome.error
    step = int(outcome.error.split("at step ")[1].split(";")[0])
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] <= step
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())
    assert not (cli.folder / "run/result.json").exists()


def test_a_full_disk_leaves_a_run_that_goes_on(cli):
    import resource

    run = ("hydra.run.dir=run", "checkpoint.every_steps=1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The config fits into this limit, a checkpoint does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        error = cli.train(*run).error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not save" in error and "File too large" in error
    assert not [name for name in cli.files() if name.endswith((".ckpt", ".tmp"))]
    assert cli.train(*run).code == 0
    assert result(cli.folder / "run")["status"] == "finished"


def test_a_folder_that_holds_another_run_is_an_error(cli):
    assert cli.train("hydra.run.dir=run").code == 0
    before = (cli.folder / "run/result.json").read_text()
    error = cli.train("hydra.run.dir=run", "recipe.epochs=3").error
    assert "holds a run with recipe.epochs=2, not 3: choose another hydra.run.dir, or rerun=true" in error
    assert (cli.folder / "run/result.json").read_text() == before
