"""Evaluation: it turns predictions, as NumPy arrays, into figures with confidence intervals, tables and plots."""
