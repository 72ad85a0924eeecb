"""Retinue: train, evaluate and compare vision backbones."""

__version__ = "0.2.0"
