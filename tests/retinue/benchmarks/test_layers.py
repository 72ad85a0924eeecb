"""Tests of the layers of nets in which primitives are measured."""

import pytest

from retinue.benchmarks.layers import NeighborhoodLayer, layers
from retinue.utils.arithmetic import ceil_div


def test_the_number_of_windows_follows_the_size_by_the_papers_law():
    def keys(image_size, fixed):
        routed = layers("routed_attention", image_size)
        return next(layer.keys for layer in routed if (layer.variant == "7 x 7 windows") == fixed)

    assert keys((2048, 2048), True) / keys((512, 512), True) == pytest.approx(16, rel=0.1)
    assert keys((2048, 2048), False) / keys((512, 512), False) == pytest.approx(16 ** (1 / 3), rel=0.2)
    assert all(layer.variant == "7 x 7 windows" for layer in layers("routed_attention", (224, 224)))


@pytest.mark.parametrize("size", [(224, 224), (800, 1333)])
@pytest.mark.parametrize(
    "primitive, depth",
    [("routed_attention", 26), ("window_attention", 12), ("neighborhood_attention", 18), ("linear_attention", 6)],
)
def test_the_layers_are_those_of_the_nets(primitive, depth, size):
    all_layers = layers(primitive, size)
    counted = [layer for layer in all_layers if layer.variant != "windows follow the size"]
    if primitive == "linear_attention":
        counted = [layer for layer in all_layers if layer.variant == all_layers[0].variant]
    assert sum(layer.count for layer in counted) == depth
    assert counted[0].tokens == ceil_div(size[0], 4) * ceil_div(size[1], 4)


def test_layers_of_all_neighborhoods_are_biased_or_not_and_dilated_or_not():
    variants: dict[str, int] = {}
    for layer in layers("neighborhood_attention", (224, 224), all_neighborhoods=True):
        variants[layer.variant] = variants.get(layer.variant, 0) + layer.count
        assert isinstance(layer, NeighborhoodLayer)
        assert all(7 * d <= side for d, side in zip(layer.dilation, layer.size, strict=True))
    # The map of the last stage is a single neighbourhood, which cannot be dilated.
    assert variants == {"with bias": 18, "no bias": 18, "with bias, dilated": 13, "no bias, dilated": 13}
