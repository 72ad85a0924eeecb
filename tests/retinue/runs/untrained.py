"""Folder of a run that has random weights, for tests of what is done with runs."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from retinue.runs.preprocessing import resolve_preprocessing
from retinue.runs.result_file import CLASSES
from retinue.runs.training import build_data, build_task, save_config
from tests.retinue.runs.cli import SWIN
from tests.retinue.runs.test_config import composed


def make_run(folder: Path, *overrides: str) -> Path:
    """Write the run, and return its folder."""
    cfg = composed(*SWIN, "logger=none", *overrides)
    OmegaConf.update(cfg, "run_dir", str(folder))
    resolve_preprocessing(cfg)
    torch.manual_seed(0)
    data = build_data(cfg)
    net = build_task(cfg, data)
    save_config(cfg, folder)
    data.classes_of_net.write(folder / CLASSES)
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": net.state_dict()}, folder / "checkpoints/best.ckpt")
    return folder
