"""Measuring speed and memory: attention, models, deformable attention of heads, the input pipeline and the trainer."""
