"""The folder of a net for a Hugging Face hub: weights, timm's description, config, classes and a card; and its upload.

`timm.create_model("hf-hub:owner/name", pretrained=True)` reads the folder, for our nets after `import models`.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from models.hub import CLASSES, RUN_CONFIG, TIMM_CONFIG, WEIGHTS
from models.merging import contiguous
from models.preprocessing import run_config
from retinue.results.collection import Run, read_run
from retinue.runs.export import Exportable
from retinue.utils.files import replacing, write_text

LICENCE = "apache-2.0"
# Insertions into a net that timm does not know.
INSERTED = ("gates", "reduction")
COUNTS = ("params", "macs")


def write_folder(exportable: Exportable, cfg: DictConfig, folder: Path) -> None:
    """Write `model.safetensors`, `config.json`, `config.yaml`, `classes.json` and `README.md`.

    Args:
        exportable: The net.
        cfg: Its config. Weights of a run bring the run's config, without the folders of the machine, and its figures.
        folder: Folder to write into; it is made as needed.

    Raises:
        ValueError: The net is no classifier that timm can build from its name and arguments.
    """
    name, args = exportable.architecture
    if cfg.task.name == "segmentation":
        raise ValueError("format=hub is for classifiers, which timm can build, not for task=segmentation")
    if inserted := [f"model.{key}" for key in INSERTED if args.get(key) is not None]:
        raise ValueError(f"format=hub is for nets that timm can build, which knows no {' or '.join(inserted)}")
    config = run_config(cfg.weights) if cfg.weights else None
    run = read_run(config.parent) if config is not None else None
    with replacing(folder / WEIGHTS) as path:
        save_file(contiguous(exportable.net.state_dict()), path, {"format": "pt"} | exportable.metadata)
    _write_timm_config(exportable, name, args, folder / TIMM_CONFIG)
    exportable.classes.write(folder / CLASSES)
    if run is not None and config is not None:
        write_text(folder / RUN_CONFIG, without_folders(config))
    write_text(folder / "README.md", make_card(exportable, name, cfg, run))


def _write_timm_config(exportable: Exportable, name: str, args: dict[str, Any], path: Path) -> None:
    """Write the description from which timm builds the net and prepares its images."""
    preparation = json.loads(exportable.metadata["preprocessing"])
    size = {"input_size": list(exportable.shape)}
    kept = {
        key: preparation[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation") if key in preparation
    }
    left_out = ("pretrained", "num_classes", "in_chans", "drop_path_rate", "drop_rate")
    model_args = {key: value for key, value in args.items() if key not in left_out}
    if preparation["in_chans"] != 3:
        model_args["in_chans"] = preparation["in_chans"]
    net: Any = exportable.net
    overlay = {"architecture": name.partition(".")[0], "num_classes": len(exportable.classes.names), **size, **kept}
    with replacing(path) as temporary:
        save_config_for_hf(
            net,
            str(temporary),
            {"pretrained_cfg": overlay, "label_names": list(exportable.classes.names)},
            model_args,
        )


def without_folders(config: Path) -> str:
    """Return a run's config as YAML without the folders and files of the machine that it names."""
    cfg: Any = OmegaConf.load(config)
    cfg.pop("run_dir", None)
    for key in ("data.root", "weights"):
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, None)
    return OmegaConf.to_yaml(cfg)


def make_card(exportable: Exportable, name: str, cfg: DictConfig, run: Run | None) -> str:
    """Return the card in Markdown: use, figures with their intervals, how the net was trained, and the licence.

    Args:
        exportable: The net.
        name: Its registry name.
        cfg: Its config.
        run: The run that trained it; None for other weights, whose figures are unknown.
    """
    header = {
        "license": LICENCE, "library_name": "timm", "tags": ["image-classification", "timm", "retinue"],
        "pipeline_tag": "image-classification",
    }  # fmt: skip
    source = json.loads(exportable.metadata["source"])
    preparation = json.loads(exportable.metadata["preprocessing"])
    lines = [
        "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
        f"# {name} on {cfg.data.name}", "",
        f"{name} with {len(exportable.classes.names)} classes, exported by Retinue {source['retinue']}.", "",
        "```python",
        "import timm, models  # models: the nets of Retinue",
        'net = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)',
        "```", "",
        "`python eval.py model=... weights=hf-hub:OWNER/NAME data=...` evaluates it.", "",
        "Preprocessing: " + ", ".join(f"{key} {value}" for key, value in preparation.items()) + ".",
    ]  # fmt: skip
    if run is not None and run.result is not None:
        command = "python train.py --config-dir . --config-name config hydra.output_subdir=null hydra.run.dir=again"
        lines += [
            "", "## Test figures", "", "| figure | value | 95 % interval |", "|---|---|---|", *_figures(run.result),
            "", "## Training", "",
            "`config.yaml` is the whole config; give `data.root=` if the data need a folder. In a folder with it,"
            f" `{command} run_dir=again` trains again. Seed {run.result.get('seed')}, commit"
            f" {run.result.get('git_commit')}.",
        ]  # fmt: skip
    lines += ["", "## Licence", "", "Apache-2.0 for the code; the weights also follow the licence of their data."]
    return "\n".join(lines) + "\n"


def _figures(result: dict[str, Any]) -> list[str]:
    """Return the rows of a table of figures, each with its interval where there is one."""
    metrics, rows = result["metrics"], []
    for figure, value in metrics.items():
        if isinstance(value, int | float):
            interval = metrics.get(f"{figure}_ci95")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            between = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            rows.append(f"| {figure} | {text} | {between} |")
    return rows + [f"| {count} | {result[count]:,} | |" for count in COUNTS if result.get(count)]


def push(folder: Path, repository: str) -> str:
    """Upload a folder that `write_folder` has written, in one commit, and return the repository's address.

    Raises:
        ValueError: The name is no `owner/name`, or the hub refuses or cannot be reached.
    """
    card = folder / "README.md"
    write_text(card, card.read_text(encoding="utf-8").replace("OWNER/NAME", repository))
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        files = [WEIGHTS, TIMM_CONFIG, RUN_CONFIG, CLASSES, card.name]
        api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=files)
    except (HFValidationError, OSError) as error:
        # The hub's errors and those of the network are OSErrors.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"push_to_hub={repository}: {reason}; the folder {folder} is complete") from error
    return str(address)
