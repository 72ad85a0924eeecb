"""From predictions to figures with confidence intervals, tables and plots; on numpy arrays, for any task's code."""
