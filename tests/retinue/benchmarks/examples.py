"""Layers that the tests of primitives measure."""

from ops.functional import gathered_attention
from retinue.benchmarks.formulations import FORMULATIONS
from retinue.benchmarks.layers import LINEAR_FORMS, Layer, LinearLayer, NeighborhoodLayer, RoutedLayer, WindowLayer

LAYERS = [
    RoutedLayer("net", 196, (14, 14), 32, 2, 3, (7, 7), 4, True),
    RoutedLayer("net", 200, (12, 20), 32, 1, 3, (4, 4), 2, False),
    WindowLayer("net", 196, (14, 14), 32, 2, 1, (7, 7), (3, 3)),
    WindowLayer("net", 100, (7, 14), 16, 1, 1, (7, 7), (0, 0)),
    NeighborhoodLayer("net", 90, (9, 10), 32, 2, 2, (7, 7), True),
    NeighborhoodLayer("net", 90, (9, 10), 32, 2, 2, (7, 5), False),
    *(LinearLayer("net", 30, (5, 6), 32, 2, 1, *form) for form in LINEAR_FORMS),
    NeighborhoodLayer("net", 90, (9, 10), 32, 2, 2, (3, 5), True, (3, 2)),
]


def runnable(layer: Layer) -> list[str]:
    """Return the names of the formulations that can run on the CPU."""
    call = layer.call(2, "cpu")
    return [name for name, formulation in FORMULATIONS[layer.primitive].items() if not formulation.obstacle(call)]


def wrong_routed_attention(qkv, index, grid, num_heads, scale):
    """Compute routed attention with a scale that is wrong by 0.1 %."""
    return gathered_attention(qkv, index, grid, num_heads, 1.001 * scale)
