"""Our detectors' and segmentors' parameters and multiply-accumulates agree with the tables in papers/.

The papers count with images of 1280 x 800 pixels for detectors and of 2048 x 512 pixels for segmentors (2560 x 640 for
segmentors trained on crops of 640 pixels), by the conventions of mmdetection's and mmsegmentation's own counters: 1,000
proposals in every box head, 100 proposals in every mask head, no auxiliary head.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn import BatchNorm2d

from models import complexity
from models.openmmlab.build import build_detector, build_segmentor
from retinue.results.experiments import dense_experiments
from retinue.results.papers import agrees, list_papers, model_choice, read_paper
from retinue.runs.config import check, register_resolvers
from retinue.utils.paths import CONF
from tests.models.test_papers import is_named

# In these papers the dense nets have the same arguments as the classifiers.
PAPERS = ("swin", "cswin", "nat", "dinat", "transnext")
HEADS = {
    "Mask R-CNN": "mask_rcnn",
    "Cascade Mask R-CNN": "cascade_mask_rcnn",
    "DINO": "dino",
    "Semantic FPN": "semantic_fpn",
    "UPerNet": "upernet",
    "Mask2Former": "mask2former",
}
QUICK = {("swin", "Swin-T"), ("cswin", "CSwin-T")}


def rows() -> list[Any]:
    """Return one test case for each head on each net and size of crops."""
    cases = {}
    for paper in PAPERS:
        facts = read_paper(paper)
        nets = {row["name"]: row for row in reversed(facts["variants"]) if "net" in row}
        for kind in ("detection", "segmentation"):
            for row in facts.get(kind, []):
                head = HEADS.get(str(row.get("detector") or row["head"]).replace("UperNet", "UPerNet"))
                if head and row["backbone"] in nets and row.get("scales") != "5scale":
                    name = f"{paper} {head} {row['backbone']} {row.get('crop', '')}"
                    marks = () if (paper, row["backbone"]) in QUICK and "640" not in name else pytest.mark.slow
                    cases.setdefault(name, pytest.param(head, nets[row["backbone"]], row, id=name, marks=marks))
    return [*cases.values()]


def count(head: str, model: Sequence[str], size: tuple[int, int], detector: bool) -> tuple[float, float]:
    """Return parameters in millions and multiply-accumulates in billions, for COCO's or ADE20K's classes."""
    net = on_meta(composed(f"data={'coco' if detector else 'ade20k'}", f"head={head}", *model))
    params, macs = complexity(net, size)
    return params / 1e6, macs / 1e9


def composed(*overrides: str) -> Any:
    """Compose the training config with these overrides."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "run_dir=run"])


def on_meta(cfg: Any) -> Any:
    """Build the net of a config on the meta device, for COCO's or ADE20K's classes."""
    detector = cfg.task.name == "detection"
    data = SimpleNamespace(num_classes=80 if detector else 150, in_chans=3, has_masks=True)
    with torch.device("meta"):
        return (build_detector if detector else build_segmentor)(cfg, data)


@pytest.mark.parametrize(("head", "variant", "row"), rows())
def test_the_papers_parameters_and_macs(head, variant, row):
    detector = "detector" in row
    size = (800, 1280) if detector else (640, 2560) if row.get("crop") == "640x640" else (512, 2048)
    params, macs = count(head, model_choice(variant["net"], {}, None), size, detector)
    for counted, key, exception in ((params, "params_m", "params_exception"), (macs, "macs_g", "macs_exception")):
        printed, reason = row.get(key), row.get(exception)
        if printed is not None:
            assert agrees(counted, printed) == (reason is None), (counted, printed, reason)
            assert reason is None or is_named(counted, reason), (counted, reason)


EXPERIMENTS = [name for paper in list_papers() for name in dense_experiments(paper)]
# Millions of parameters and billions of multiply-accumulates of detectors and segmentors on the small net, as in
# docs/heads.md; the paper's tables have no such columns.
BIFORMER = {
    "biformer/small_retinanet_1x": (35.3, 275),
    "biformer/small_mask_rcnn_1x": (45.2, 293),
    "biformer/small_semantic_fpn_80k": (29.3, 267),
    "biformer/small_upernet_160k": (55.3, 1024),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BIFORMER else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_every_experiment_builds_its_net(name):
    cfg = composed(f"experiment={name}")
    check(cfg)
    net = on_meta(cfg)
    assert net.backbone.strides == ([8, 16, 32] if "retinanet" in name else [4, 8, 16, 32])
    # mmdetection's and mmsegmentation's configs synchronise the batch norms of heads.
    batch_norms = (isinstance(m, BatchNorm2d) for part, m in net.named_modules() if not part.startswith("backbone"))
    assert cfg.trainer.sync_batchnorm == any(batch_norms)
    # UniFormer's and BiFormer's configs resize test images to multiples of 32 pixels (AlignResize).
    if cfg.head.name == "semantic_fpn":
        assert cfg.task.test.multiple == 32
    if name in BIFORMER:
        params, macs = complexity(net, (800, 1280) if cfg.task.name == "detection" else (512, 2048))
        assert agrees(params / 1e6, BIFORMER[name][0]) and agrees(macs / 1e9, BIFORMER[name][1])


@pytest.mark.parametrize(
    ("head", "size", "params", "macs"),
    [
        ("dino", (800, 1280), 47, 279),  # arXiv:2203.03605, four scales
        ("mask2former", (512, 512), 44, 71),  # arXiv:2112.01527, ADE20K
    ],
)
def test_transformer_heads_agree_with_their_papers(head, size, params, macs):
    """Compare heads on ResNet-50 with their papers, whose counters include the sampling of deformable attention."""
    counted = count(head, ["model=timm", "model.name=resnet50"], size, head == "dino")
    assert abs(counted[0] - params) < 1 and abs(counted[1] - macs) < 0.02 * macs, counted
