"""Integer arithmetic that sizes of maps, windows and tiles need."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `a`."""
    return ceil_div(a, multiple) * multiple


def padding(size: int, multiple: int) -> int:
    """Return the smallest number that makes `size` a multiple of `multiple` when it is added to it.

    For variable sizes, torch 2.11 fails to compile the shorter `-size % multiple` in a net that also resizes a tensor.
    """
    return round_up(size, multiple) - size
