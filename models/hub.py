"""Weights of a Hugging Face hub under the name `hf-hub:owner/name`, and of a folder with the same files."""

from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

PREFIX = "hf-hub:"
# Files of a repository: the weights, timm's description of the net, and the config and the classes of our run.
WEIGHTS, TIMM_CONFIG, RUN_CONFIG, CLASSES = "model.safetensors", "config.json", "config.yaml", "classes.json"


def is_hub_name(weights: str | Path) -> bool:
    """Tell whether `weights` names a repository of the hub rather than a file."""
    return str(weights).startswith(PREFIX)


@cache
def fetch(weights: str) -> Path:
    """Return the local folder with the files of `hf-hub:owner/name`, which are downloaded once.

    Raises:
        ValueError: The repository cannot be read, or it has no safetensors file. Files of other kinds are not read.
    """
    try:
        folder = Path(snapshot_download(weights.removeprefix(PREFIX), allow_patterns=[WEIGHTS, RUN_CONFIG, CLASSES]))
    except (HFValidationError, OSError) as error:
        # The hub's errors and those of the network are OSErrors.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{weights} cannot be read from the hub: {reason}") from error
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{weights} has no {WEIGHTS}")
    return folder
