"""Reference vectors, which of our modules must reproduce each of them, and the comparison."""

from pathlib import Path

VECTOR_FILES = {path.name.removesuffix(".json.gz"): path for path in sorted(Path(__file__).parent.glob("*.json.gz"))}
