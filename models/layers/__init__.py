"""Layers that several papers share and timm.layers lacks."""
