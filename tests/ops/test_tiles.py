"""Attention in tiles: rules of a side, shared keys, ragged windows, and linear cost of the ops that promise it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ops import create_op
from ops.tiles import attend_in_tiles, ragged_window_attention, relative_bias, sliding_tiles, window_tiles
from ops.windows import weighted_sums

CPU = torch.device("cpu")


def attended_keys(tiles, n):
    """Return the keys of each position of a side of n tokens, with their offsets."""
    keys = []
    for index in tiles.order.tolist():
        tile, query = divmod(index, tiles.queries.shape[1])
        places = tiles.attended[tile, query].nonzero().flatten().tolist()
        keys.append({tiles.keys[tile, place].item(): tiles.offsets[tile, query, place].item() for place in places})
        assert len(keys[-1]) == len(places)
    assert [tiles.queries.flatten()[index].item() for index in tiles.order.tolist()] == list(range(n))
    return keys


@pytest.mark.parametrize("tile", [1, 3, 20])
@pytest.mark.parametrize(("n", "reach"), [(10, 2), (7, 0), (4, 9)])
def test_a_sliding_window_is_cut_off_at_the_ends(n, reach, tile):
    expected = [{k: k - q for k in range(n) if abs(k - q) <= reach} for q in range(n)]
    assert attended_keys(sliding_tiles(n, reach, tile, CPU), n) == expected


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize(("n", "window", "shift"), [(12, 4, 2), (10, 4, 3), (9, 4, 0), (3, 5, 2)])
def test_windows_hold_the_tokens_of_the_map_only(n, window, shift, wrap):
    length = n if wrap else -(-n // window) * window

    def place(token):
        return (token - shift) % length

    def apart(token):
        return not wrap and token < shift

    expected = [
        {k: place(k) - place(q) for k in range(n) if place(k) // window == place(q) // window and apart(k) == apart(q)}
        for q in range(n)
    ]
    assert attended_keys(window_tiles(n, window, shift, wrap, CPU), n) == expected


def test_shared_keys_are_in_the_same_softmax_and_may_differ_by_tile():
    torch.manual_seed(0)
    (H, W), heads = (5, 4), 2
    qkv, shared = torch.randn(2, H, W, 24), torch.randn(2, 4, 3, 16)
    rows, columns = sliding_tiles(H, 1, 3, CPU), sliding_tiles(W, 1, 2, CPU)
    table, seen = torch.randn(heads, 3, 3), torch.rand(4, 3) > 0.5
    out = attend_in_tiles(
        qkv, heads, rows, columns, bias=relative_bias(table, rows, columns), scale=0.7, shared=shared, shared_mask=seen
    )
    for i in range(H):
        for j in range(W):
            tile = i // 3 * 2 + j // 2
            near = [(a, b) for a in range(H) for b in range(W) if abs(a - i) <= 1 and abs(b - j) <= 1]
            own, more = torch.stack([qkv[:, a, b, 8:] for a, b in near], 1), shared[:, tile, seen[tile]]
            k, v = torch.cat([own, more], 1).unflatten(-1, (2, heads, 4)).unbind(2)
            bias = torch.stack([table[:, a - i + 1, b - j + 1] for a, b in near], 1)
            bias = F.pad(bias, (0, more.shape[1]))
            q = qkv[:, i, j, :8].unflatten(-1, (heads, 4))
            weights = (torch.einsum("bhd,bnhd->bhn", q, k) * 0.7 + bias).softmax(-1)
            assert torch.allclose(out[:, i, j], torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1), atol=1e-6)


@pytest.mark.parametrize(("shift", "wrap"), [((0, 0), False), ((2, 1), False), ((2, 1), True)])
def test_ragged_windows_that_fit_are_windows(shift, wrap):
    """The same function on a map that fits, and on the tiles that other maps take."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(2, 8, 6, 3, 8), torch.randn(2, 12, 12)
    out = ragged_window_attention(qkv, bias, 2, (4, 3), shift, wrap)
    rows, columns = window_tiles(8, 4, shift[0], wrap, CPU), window_tiles(6, 3, shift[1], wrap, CPU)
    assert torch.allclose(out, attend_in_tiles(qkv.flatten(-2), 2, rows, columns, bias=bias), atol=1e-6)


def test_weighted_sums_of_ragged_cells_are_means_for_equal_weights():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 8, 3)
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, ceil_mode=True).permute(0, 2, 3, 1)
    assert torch.allclose(weighted_sums(x, torch.full((3, 3, 1), 1 / 9)), means, atol=1e-6)
    weight = torch.randn(4, 4, 3)
    conv = F.conv2d(x[:, :4].permute(0, 3, 1, 2), weight.permute(2, 0, 1).unsqueeze(1), stride=4, groups=3)
    assert torch.allclose(weighted_sums(x[:, :4], weight), conv.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "circular_local", "radius": 2},
        {"name": "inward_window", "window": 5},
        {"name": "anchor_window", "window": 4, "anchors": "local"},
        {"name": "anchor_window", "window": 4, "anchors": "local", "form": "block"},
        {"name": "double_window", "window": 4},
        {"name": "overlapping_cross", "window": 4},
    ],
    ids=str,
)
def test_cost_is_linear_in_the_size_of_the_map(spec):
    flops = []
    op = create_op(spec, 8, 2).to("meta")
    for side in (64, 128):
        with FlopCounterMode(display=False) as counter:
            op(torch.empty(1, side, side, 8, device="meta"))
        flops.append(counter.get_total_flops())
    assert flops[1] == 4 * flops[0]
