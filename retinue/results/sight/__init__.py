"""Views of what a net looks at, each kind as a picture and as data: `scripts/see.py`."""

from collections.abc import Callable
from pathlib import Path

from retinue.results.sight import images, tables
from retinue.results.sight.subject import Choices, Subject

# Kind -> function that writes its files to a folder.
KINDS: dict[str, Callable[[Subject, Choices, Path], None]] = {
    "erf": images.see_erf,
    "attention": images.see_attention,
    "routes": images.see_routes,
    "distance": tables.see_distance,
    "gradcam": images.see_gradcam,
    "cka": tables.see_cka,
    "pca": images.see_pca,
    "frequency": tables.see_frequency,
    "similarity": tables.see_similarity,
    "influence": tables.see_influence,
    "heads": tables.see_heads,
    "sinks": images.see_sinks,
    "paths": tables.see_paths,
}
