"""Triton kernels of the attention primitives; a primitive imports its kernels when it first runs them."""
