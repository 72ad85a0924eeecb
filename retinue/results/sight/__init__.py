"""Views of what a net looks at, each kind as a picture and as data: `scripts/see.py`."""

from collections.abc import Callable
from pathlib import Path

from retinue.results.sight import images, tables
from retinue.results.sight.subject import Choices, Subject

# Kind that is drawn over images -> function that returns its view.
VIEWS: dict[str, Callable[[Subject, Choices], images.View]] = {
    "erf": images.view_erf,
    "attention": images.view_attention,
    "routes": images.view_routes,
    "gradcam": images.view_gradcam,
    "pca": images.view_pca,
    "sinks": images.view_sinks,
}
# Kind of curves, matrices and tables -> function that writes its files to a folder.
TABLES: dict[str, Callable[[Subject, Choices, Path], None]] = {
    "distance": tables.see_distance,
    "cka": tables.see_cka,
    "frequency": tables.see_frequency,
    "similarity": tables.see_similarity,
    "influence": tables.see_influence,
    "heads": tables.see_heads,
    "paths": tables.see_paths,
}
# Kinds that show one query.
WITH_QUERY = ("attention", "routes")


def see(kind: str, subject: Subject, choices: Choices, out: Path) -> None:
    """Write the files of a kind of sight to a folder."""
    if kind in VIEWS:
        images.write_view(kind, VIEWS[kind](subject, choices), subject.title, out)
    else:
        TABLES[kind](subject, choices, out)
