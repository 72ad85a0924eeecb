"""Timing attention primitives, ops and nets against named peers, and tuning the kernels."""
