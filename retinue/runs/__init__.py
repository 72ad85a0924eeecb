"""A run: its folder, checkpoints, progress, errors and its one result."""
