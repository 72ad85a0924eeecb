"""One run: its identity and folder, its processes, checkpoints, progress, state and result."""
