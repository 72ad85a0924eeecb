"""Gates, one file per gate; `ops/__init__.py` imports them all."""
