"""Triton kernels of the attention primitives; each file is imported by its primitive, and only when it runs."""
