"""Parameters and multiply-accumulates of the papers' detectors and segmentors (the rows of papers).

The figures are of images of 1280 x 800 pixels for detectors and of 2048 x 512 for segmentors, or of 2560 x 640 for
those trained on crops of 640 pixels, by the conventions of mmdetection's and mmsegmentation's own counters: 1,000
proposals in every box head, 100 in every mask head, no auxiliary head.
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

PAPERS = ("swin", "cswin", "nat", "dinat", "transnext")  # whose dense nets are the classifiers' with no other arguments
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
    """Each head on each net and crop once."""
    found = {}
    for paper in PAPERS:
        facts = read_paper(paper)
        nets = {row["name"]: row for row in reversed(facts["variants"]) if "net" in row}
        for kind in ("detection", "segmentation"):
            for row in facts.get(kind, []):
                head = HEADS.get(str(row.get("detector") or row["head"]).replace("UperNet", "UPerNet"))
                if head and row["backbone"] in nets and row.get("scales") != "5scale":
                    name = f"{paper} {head} {row['backbone']} {row.get('crop', '')}"
                    slow = () if (paper, row["backbone"]) in QUICK and "640" not in name else pytest.mark.slow
                    found.setdefault(name, pytest.param(head, nets[row["backbone"]], row, id=name, marks=slow))
    return [*found.values()]


def count(head: str, model: Sequence[str], size: tuple[int, int], detector: bool) -> tuple[float, float]:
    """Parameters in M and multiply-accumulates in G, for the classes of COCO or ADE20K."""
    net = on_meta(composed(f"data={'coco' if detector else 'ade20k'}", f"head={head}", *model))
    params, macs = complexity(net, size)
    return params / 1e6, macs / 1e9


def composed(*overrides: str) -> Any:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "run_dir=run"])


def on_meta(cfg: Any) -> Any:
    """The net of a config for COCO's or ADE20K's classes."""
    detector = cfg.task.name == "detection"
    data = SimpleNamespace(num_classes=80 if detector else 150, in_chans=3, has_masks=True)
    with torch.device("meta"):
        return (build_detector if detector else build_segmentor)(cfg, data)


@pytest.mark.parametrize(("head", "variant", "row"), rows())
def test_the_papers_parameters_and_macs(head, variant, row):
    detector = "detector" in row
    size = (800, 1280) if detector else (640, 2560) if row.get("crop") == "640x640" else (512, 2048)
    params, macs = count(head, model_choice(variant["net"], {}, None), size, detector)
    for counted, kind in ((params, "params_m"), (macs, "flops_g")):
        table, reason = row.get(kind), row.get(f"{kind.partition('_')[0]}_exception")
        if table is not None:
            assert agrees(counted, table) == (reason is None), (counted, table, reason)
            assert reason is None or is_named(counted, reason), (counted, reason)


EXPERIMENTS = [name for paper in list_papers() for name in dense_experiments(paper)]
BIFORMER = {  # M parameters and G multiply-accumulates of the small net as docs/heads.md tells; its tables have none
    "biformer/small_retinanet_1x": (35.3, 275),
    "biformer/small_mask_rcnn_1x": (45.2, 293),
    "biformer/small_semantic_fpn_80k": (29.3, 267),
    "biformer/small_upernet_160k": (55.3, 1024),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BIFORMER else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_every_experiment_is_a_net(name):
    cfg = composed(f"experiment={name}")
    check(cfg)
    net = on_meta(cfg)
    assert net.backbone.strides == ([8, 16, 32] if "retinanet" in name else [4, 8, 16, 32])
    of_batches = (isinstance(m, BatchNorm2d) for part, m in net.named_modules() if not part.startswith("backbone"))
    assert cfg.trainer.sync_batchnorm == any(of_batches)  # as the packages' configs have them
    if cfg.head.name == "semantic_fpn":
        assert cfg.task.test.multiple == 32  # AlignResize of UniFormer's and BiFormer's configs
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
def test_the_transformers_of_their_own_papers(head, size, params, macs):
    """On ResNet-50. These were counted by other counters, which see the sampling of deformable attention."""
    counted = count(head, ["model=timm", "model.name=resnet50"], size, head == "dino")
    assert abs(counted[0] - params) < 1 and abs(counted[1] - macs) < 0.02 * macs, counted
