"""Pictures of what a run's net looks at, in the run's folder: `see.py` writes them, and the report shows them."""

import base64
import json
from pathlib import Path
from typing import Any

from retinue.utils.files import write_text

# Folder of the pictures in a run's folder
FOLDER = "sight"


def write_caption(folder: Path, kind: str, query: str | None, command: str) -> None:
    """Write `<kind>.json`, which says what the picture `<kind>.png` beside it shows, and by which command.

    Args:
        folder: Folder of the picture.
        kind: Kind of sight, such as `attention`.
        query: Place of the query, such as `0.5,0.5`; None for a kind without a query.
        command: Shell command that draws the picture.
    """
    write_text(folder / f"{kind}.json", json.dumps({"kind": kind, "query": query, "command": command}) + "\n")


def read_pictures(run: Path) -> list[dict[str, Any]]:
    """Return the title, the command and the embedded image of each picture in a run's folder, sorted by name.

    A caption that cannot be read, or without its picture, is left out.
    """
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            caption = json.loads(path.read_text(encoding="utf-8"))
            title = caption["kind"] + (f", query {caption['query']}" if caption["query"] else "")
            image = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
            found.append({"title": title, "command": str(caption["command"]), "src": f"data:image/png;base64,{image}"})
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return found
