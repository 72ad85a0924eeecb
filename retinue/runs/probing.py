"""Probe a frozen net: compute its features or take them from the cache, fit a probe, and write the result."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import nn

from models import load_weights
from models.preprocessing import KEYS
from retinue.evaluation.classification import Predictions, summarize, topk_predictions
from retinue.evaluation.predictions import write_predictions_csv
from retinue.evaluation.statistics import mean_ci95, rate_interval
from retinue.probing.attentive import AttentiveProbe
from retinue.probing.cache import cached, images_digest, weights_digest
from retinue.probing.choice import Probe, choose, predict
from retinue.probing.features import KINDS, Features, extract, read
from retinue.probing.few_shot import draw_shots, least_squares
from retinue.probing.linear import LinearProbe, LogisticProbe
from retinue.probing.neighbours import NeighbourProbe
from retinue.probing.outliers import OutlierScores, outlier_figures
from retinue.probing.retrieval import retrieve, summarise_queries
from retinue.runs.config import check, world_size
from retinue.runs.evaluation import prepare
from retinue.runs.folders import no_empty_folder, refuse_inside_a_run, refuse_over_a_run
from retinue.runs.identity import fingerprint, identity
from retinue.runs.preprocessing import resolved_data
from retinue.runs.result_file import provenance, read_result, show_result, write_result
from retinue.runs.schema import check_values
from retinue.runs.training import build_data, result_labels
from retinue.tasks.classification import Classification
from retinue.utils.paths import CONF, list_group
from retinue.utils.suggestions import nearest

log = logging.getLogger(__name__)

# Probes that classify the test images, and choose their settings on held-out training images.
CLASSIFIERS = ("linear", "logistic", "knn", "attentive")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def probe(cfg: DictConfig) -> dict[str, Any]:
    """Probe a net as composed, and write `result.json`; a finished probing is not repeated.

    Returns:
        The metrics: `test/top1`, `test/top1_ci95`, ...; the main figure comes first.

    Raises:
        ValueError: the config is contradictory, or weights, net and data do not fit together.
    """
    folder = Path(str(cfg.run_dir))
    with no_empty_folder(folder):
        refuse_over_a_run(folder)
        refuse_inside_a_run(folder)
        check(cfg)
        if cfg.task.name != "classification":
            raise ValueError(f"probe.py is for task=classification, not task={cfg.task.name}")
        if world_size(cfg) > 1:
            raise ValueError(f"probe.py computes on one device, not on {world_size(cfg)}: trainer.devices=1")
        result = read_result(folder)
        if result is None or result.get("config_sha256") != fingerprint(cfg):
            prepare(cfg)
            result = Probing(cfg).run(folder)
    show_result(result, folder)
    return result["metrics"]


class Probing:
    """One probing: the net, its data, and the features that were computed or found.

    Args:
        cfg: the config, with preprocessing filled in.

    Attributes:
        kind: kind of the features, a key of `retinue.probing.features.KINDS`.
        from_cache: names of the splits and data sets whose features were in the cache.

    Raises:
        ValueError: the weights do not fit, or the probe cannot read this kind of features.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg, self.device = cfg, pick_device(cfg.trainer.accelerator)
        self.kind = cfg.feature or ("map" if cfg.probe.name == "attentive" else "head")
        if (self.kind in ("map", "tokens")) != (cfg.probe.name == "attentive"):
            kinds = ("map", "tokens") if cfg.probe.name == "attentive" else ("head", "class_token", "mean")
            raise ValueError(f"probe={cfg.probe.name} reads feature={' or '.join(kinds)}, not feature={self.kind}")
        self.datamodule = build_data(cfg)
        self.net = Classification.build_net(cfg, self.datamodule)
        published: Any = getattr(self.net, "pretrained_cfg", {})
        self.has_classifier = published.get("num_classes") == self.datamodule.num_classes
        if cfg.weights:
            self.has_classifier = not load_weights(self.net, cfg.weights, drop_classifier=True).missing
        self.weights = weights_digest(self.net)
        # Faults of other data and of the classifier are said before the features are computed, which takes long.
        self.others = self.other_data() if cfg.probe.name == "ood" else {}
        self.own_classifier = self.find_own_classifier() if cfg.probe.get("classifier") == "own" else None
        self.from_cache: list[str] = []

    def run(self, folder: Path) -> dict[str, Any]:
        """Compute the figures, write `result.json` and for classifiers `predictions.csv`, and return the result."""
        cfg, name = self.cfg, self.cfg.probe.name
        train, test = self.features("train"), self.features("test")
        # The tokens of an attentive probe may be too many for the device.
        if name != "attentive":
            train, test = train.to(self.device), test.to(self.device)
        predictions = None
        if name in CLASSIFIERS:
            predictions, figures, facts = self.classify(train, test)
        elif name == "few_shot":
            figures, facts = self.few_shot(train, test)
        elif name == "retrieval":
            figures, facts = self.retrieve(train, test)
        else:
            figures, facts = self.find_outliers(train, test)
        result = {
            "status": "finished",
            **result_labels(cfg),
            "task": "probing",
            "probe": name,
            "feature": self.kind,
            "feature_meaning": KINDS[self.kind],
            "feature_shape": list(train.values.shape[1:]),
            "train_images": len(train.label),
            **facts,
            "settings": OmegaConf.to_container(cfg.probe, resolve=True),
            "seed": cfg.seed,
            "weights": cfg.weights,
            "weights_sha256": self.weights,
            "image_size": resolved_data(cfg)["image_size"],
            "metrics": {f"test/{figure}": value for figure, value in figures.items()},
            "precision": cfg.trainer.precision,
            "from_cache": self.from_cache,
            **self.datamodule.note,
            **provenance(),
            "config_sha256": fingerprint(cfg),
        }
        write_result(folder, result)
        if predictions is not None:
            names, classes = self.datamodule.names("test"), self.datamodule.class_names
            write_predictions_csv(folder / "predictions.csv", predictions, classes, names)
        return result

    def features(self, split: str, datamodule: Any = None, name: str | None = None) -> Features:
        """Return the features of a split, from the cache if they are there.

        Args:
            split: train, val or test.
            datamodule: another data module than the net's own.
            name: name of its data.
        """
        cfg, datamodule = self.cfg, datamodule or self.datamodule
        data = resolved_data(cfg)
        facts = {
            "net": identity(cfg)["model"],
            "weights": self.weights,
            "preprocessing": {key: data[key] for key in (*KEYS, "in_chans", "bands") if key in data},
            "data": [name or cfg.data.name, split, images_digest(datamodule.images(split))],
            "kind": self.kind,
            "precision": [cfg.trainer.precision, self.device.type],
        }
        folder = None if cfg.cache is None else Path(cfg.cache).expanduser()
        dtype = DTYPES[cfg.trainer.precision]
        features, found = cached(
            folder, facts, lambda: extract(self.net, datamodule, split, self.kind, self.device, dtype)
        )
        if found:
            self.from_cache.append(name or split)
        return features

    def classify(self, train: Features, test: Features) -> tuple[Predictions, dict[str, Any], dict[str, Any]]:
        """Return the predictions of the test images, their figures, and how the probe's setting was chosen."""
        chosen = choose(self.classifier(), train, self.cfg.holdout, self.cfg.seed)
        logits = predict(chosen.scores, test.values)[0]
        predictions = topk_predictions(logits, test.label.cpu(), test.index.cpu(), self.datamodule.class_subset)
        figures = summarize(predictions, self.datamodule.class_names)
        text = "the only setting"
        if chosen.images:
            text = f"{chosen.images} of the {len(train.label)} training images, the same share of each class"
        return (
            predictions,
            main_first(figures, "top1"),
            {"chosen": chosen.setting, "chosen_by": text, "trials": chosen.trials},
        )

    def classifier(self) -> Probe:
        """Return the probe that the config names."""
        settings: Any = OmegaConf.to_container(self.cfg.probe, resolve=True)
        name, classes, seed = settings.pop("name"), self.datamodule.num_classes, self.cfg.seed
        if name == "linear":
            return LinearProbe(classes, **settings, seed=seed)
        if name == "logistic":
            return LogisticProbe(classes, **settings)
        if name == "knn":
            return NeighbourProbe(classes, settings["k"], settings["temperature"])
        pool = {"name": settings.pop("pool")} | {
            key: settings.pop(key) for key in ("queries", "reduction", "num_heads")
        }
        return AttentiveProbe(classes, pool, **settings, seed=seed, device=self.device)

    def few_shot(self, train: Features, test: Features) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the mean accuracy over the draws for each number of shots, and the accuracy of each draw."""
        settings, classes = self.cfg.probe, self.datamodule.num_classes
        figures: dict[str, Any] = {}
        draws: dict[str, list[float]] = {}
        # The largest number of shots has the main figure.
        for shots in sorted(settings.shots, reverse=True):
            accuracies = []
            for seed in range(settings.draws):
                drawn = train.take(draw_shots(train.label, shots, seed))
                scores = least_squares(drawn, classes, settings.l2, test.values)
                accuracies.append(float((scores.argmax(1).cpu() == test.label.cpu()).double().mean()))
            name = f"top1_{shots}shot"
            figures[name] = mean_ci95(accuracies)[0]
            if settings.draws > 1:
                figures[f"{name}_ci95"] = list(rate_interval(accuracies))
            draws[name] = accuracies
        figures["n"] = len(test.label)
        return figures, {"draws": draws, "interval": "Student's t over the draws of training images"}

    def retrieve(self, train: Features, test: Features) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the figures of a search for each test image, and the number of images that are searched."""
        leave_one_out = self.cfg.probe.gallery == "test"
        gallery = test if leave_one_out else train
        values = retrieve(test, gallery, self.cfg.probe.ranks, leave_one_out)
        facts = {"gallery_images": len(gallery.label) - leave_one_out, "bits": gallery.values.shape[1]}
        figures = summarise_queries(values, seed=self.cfg.seed)
        return main_first(figures, "map"), facts

    def find_outliers(self, train: Features, test: Features) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return AUROC and FPR95 of each score for each other data set, and the sizes of these sets."""
        if self.own_classifier is not None:
            weight, bias = self.own_classifier
        else:
            # On features as they are, since ViM needs the classifier of these features.
            probe = LogisticProbe(self.datamodule.num_classes, [1.0], max_iterations=1000)
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            weight, bias = probe.solve(train.values.to(dtype), train.label, 1.0)
        sets = [self.features("test", datamodule, name) for name, datamodule in self.others.items()]
        inside, *outside = OutlierScores(train, weight, bias, self.cfg.probe.k)([test, *sets])
        figures = {
            f"{name}/{figure}": value
            for name, scores in zip(self.others, outside, strict=True)
            for figure, value in outlier_figures(inside, scores, seed=self.cfg.seed).items()
        }
        first = next(key for key, value in figures.items() if isinstance(value, float))
        return main_first(figures, first) | {"n": len(test.label)}, {}

    def find_own_classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights (D, K) and biases (K,) of the net's own classifier, for the outlier scores.

        Raises:
            ValueError: the net has no trained linear classifier for these classes that reads these features.
        """
        classes = self.datamodule.num_classes
        classifier: Any = self.net.get_classifier()  # pyright: ignore[reportCallIssue]
        hint = "; probe.classifier=logistic fits one"
        if not self.has_classifier:
            raise ValueError(f"the weights have no classifier of the {classes} classes of {self.cfg.data.name}{hint}")
        if type(classifier) is not nn.Linear or self.kind != "head" or not self.reads_head(classifier):
            raise ValueError(f"the net's own logits are no linear function of feature={self.kind}{hint}")
        bias = classifier.weight.new_zeros(classes) if classifier.bias is None else classifier.bias
        return classifier.weight.detach().T, bias.detach()

    @torch.no_grad()
    def reads_head(self, classifier: nn.Module) -> bool:
        """Tell whether the net's logits are those of its classifier for the feature `head`, on a random image."""
        self.net.to(self.device).eval()
        sides = resolved_data(self.cfg)["image_size"]
        height, width = (sides, sides) if isinstance(sides, int) else sides
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, self.datamodule.in_chans, height, width, generator=generator).to(self.device)
        return torch.allclose(classifier(read(self.net, image, "head")), self.net(image), rtol=1e-3, atol=1e-4)

    def other_data(self) -> dict[str, Any]:
        """Return the data modules of the other data of the outlier scores, by names such as `near/fashion_mnist`."""
        return {
            f"{group}/{choice if isinstance(choice, str) else choice.get('name')}": self.build_other(choice)
            for group in ("near", "far")
            for choice in self.cfg.probe[group]
        }

    def build_other(self, choice: str | Mapping[str, Any]) -> Any:
        """Return the data module of other data, whose images are prepared as those of the net's own data.

        Args:
            choice: a name in conf/data, or a mapping with it as `name` and further keys of the data, such as `root`.

        Raises:
            ValueError: there are no such data, or a key is wrong.
        """
        keys = {"name": choice} if isinstance(choice, str) else dict(choice)
        name = keys.pop("name", None)
        if name not in list_group("data"):
            known = list_group("data")
            raise ValueError(f"there are no data {name!r}.{nearest(str(name), known)} There are: {', '.join(known)}")
        changes = [f"data={name}", "run_dir=."]
        if GlobalHydra.instance().is_initialized():
            cfg = compose("probe", changes)
        else:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("probe", changes)
        if cfg.task.name != "classification":
            raise ValueError(f"probe=ood takes data of task=classification, not data={name}")
        for key, value in keys.items():
            if key not in cfg.data:
                raise ValueError(f"data={name} has no key {key!r}.{nearest(str(key), map(str, cfg.data))}")
            cfg.data[key] = value
        cfg.probe = self.cfg.probe
        check_values(cfg)
        own = resolved_data(self.cfg)
        for key in (*KEYS, "in_chans"):
            OmegaConf.update(cfg.data, key, own[key], force_add=True)
        cfg.recipe = self.cfg.recipe
        return build_data(cfg)


def main_first(figures: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the figures with a figure and its interval in front, as sweeps and tables read them."""
    main = {key: figures[key] for key in (name, f"{name}_ci95")}
    return main | figures


def pick_device(accelerator: str) -> torch.device:
    """Return the device of a `trainer.accelerator`."""
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")
