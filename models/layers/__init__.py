"""Layers that several papers share and that timm.layers lacks."""
