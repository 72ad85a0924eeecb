"""Supernets: nets whose weights many architectures share, and the spaces of these architectures."""
