"""Attention rows of ops: known answers, the ops' own outputs, and refusals."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models.factory import build
from ops import create_op
from retinue.evaluation.sight.attention import Call, capture, find_attention, output_layers, value_layers
from retinue.evaluation.sight.rows import all_rows, attention_rows

SIDE = 14
QUERY = 5 * SIDE + 9
# Ops whose attention is shown and whose value layer reads each token of the map once, in the order of the map.
OPS = (
    "agent", "bilevel_routing", "block_mixture", "combiner", "conv_enhanced_window", "core_context",
    "cross_shaped_window", "decomposed_position", "double_window", "enhanced_linear", "flow", "full", "grid",
    "grouped_query", "hierarchical", "multi_shift_window", "neighborhood", "overlapping_cross",
    "overlapping_patch", "plain_window", "polyline_path", "position_aware", "prob_sparse", "radial",
    "rectified_sparse", "recurrent_softmax", "region", "relative_conv_attention", "softmax_free", "sparsifiner",
    "varied_size_window", "window",
)  # fmt: skip
# Ops whose rows do not sum to 1.
NOT_NORMALISED = ("enhanced_linear", "flow", "overlapping_cross", "softmax_free", "varied_size_window")


def make_call(name: Any, x: Tensor | None = None, **arguments: Any) -> Call:
    torch.manual_seed(0)
    op = create_op(name, 16, 2, **arguments).eval()
    return Call(op, (torch.randn(1, SIDE, SIDE, 16) if x is None else x,), {}, (SIDE, SIDE), 0)


@torch.no_grad()
def response(call: Call, shift: Tensor) -> Tensor:
    """Return by how much the op's output at the query changes if `shift` (N,) is added to all values of the tokens."""
    [(layer, width)] = value_layers(call.module)

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., output.shape[-1] - width :] += shift.view(*output.shape[:-1], 1)
        return output

    before = call.module(*call.args)
    handle = layer.register_forward_hook(add)
    after = call.module(*call.args)
    handle.remove()
    return (after - before).flatten(1, 2)[0, QUERY]


@pytest.mark.parametrize("name", OPS)
def test_rows_are_the_response_of_the_ops_output_to_its_values(name: str):
    call = make_call(name)
    for module in call.module.modules():
        # Positional convolutions of the values are no attention.
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels:
            nn.init.zeros_(module.weight)
    rows = attention_rows(call, [QUERY])
    shift = torch.rand(SIDE * SIDE)
    # Every channel of a head is checked, although the row is computed from one.
    by_head = rows.map[:, 0].flatten(1) @ shift
    layer: Any = output_layers(call.module)[0]
    with torch.no_grad():
        heads = by_head.repeat_interleave(layer.in_features // len(by_head))
        expected = layer(heads) - layer(torch.zeros_like(heads))
    torch.testing.assert_close(response(call, shift), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    sums = rows.map.sum((2, 3))
    assert name in NOT_NORMALISED or torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert rows.outside.abs().max() < 1e-5


def test_full_attention_with_a_class_token_is_the_softmax():
    call = make_call("full")
    op, x, extra = call.module, call.args[0], torch.randn(1, 2, 16)
    rows = attention_rows(Call(op, (x, extra), {}, (SIDE, SIDE), 2), [0, 2 + QUERY])
    q, k, _ = op.qkv(torch.cat([extra, x.flatten(1, 2)], 1)).chunk(3, -1)
    for head in range(2):
        channels = slice(8 * head, 8 * head + 8)
        for position, query in enumerate((0, 2 + QUERY)):
            expected = (q[0, query, channels] @ k[0, :, channels].T * 8**-0.5).softmax(-1)
            found = torch.cat([rows.extra[head, position], rows.map[head, position].flatten()])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert all(parameter.requires_grad for parameter in op.parameters())


@pytest.mark.parametrize(("name", "size"), [("full", SIDE), ("window", 7)])
def test_equal_scores_give_equal_weights_inside_the_window(name: str, size: int):
    call = make_call(name)
    with torch.no_grad():
        call.module.qkv.weight[:32] = 0
        call.module.qkv.bias[:32] = 0
        if name == "window":
            call.module.relative_position_bias_table.zero_()
    expected = torch.zeros(SIDE, SIDE)
    # The query (5, 9) is in the second window of the first row.
    expected[:size, SIDE - size :] = 1 / size**2
    torch.testing.assert_close(attention_rows(call, [QUERY]).map[:, 0], expected.expand(2, -1, -1))


def test_a_neighbourhood_and_a_shifted_window_are_where_they_should_be():
    rows = attention_rows(make_call("neighborhood", kernel=3), [QUERY]).map[0, 0]
    assert rows.nonzero().tolist() == [[y, x] for y in (4, 5, 6) for x in (8, 9, 10)]
    rows = attention_rows(make_call("window", shift=3), [QUERY]).map[0, 0]
    assert rows.nonzero().tolist() == [[y, x] for y in range(3, 10) for x in range(3, 10)]


def test_padding_and_smaller_maps_of_values():
    torch.manual_seed(0)
    op = create_op("window", 16, 2).eval()
    rows = attention_rows(Call(op, (torch.randn(1, 5, 9, 16),), {}, (5, 9), 0), [8])
    # The window shrinks to 5 x 7, and the second one holds 2 columns of the map and 5 of padding.
    assert (rows.map > 0).sum() == 2 * 5 * 2 and float(rows.outside.min()) > 0.5
    torch.testing.assert_close(rows.map.sum((2, 3)) + rows.outside, torch.ones(2, 1))
    rows = attention_rows(make_call("spatial_reduction", ratio=2), [QUERY]).map
    assert torch.equal(rows[..., ::2, ::2], rows[..., 1::2, 1::2]) and rows[0].std() > 0
    torch.testing.assert_close(rows.sum((2, 3)), torch.ones(2, 1))


def test_values_of_the_map_and_of_a_pooled_map_add_up():
    torch.manual_seed(0)
    net: Any = build("swin_nano", mixers="pixel_focused", depths=(1, 1), heads=(2, 4), num_classes=3)
    call = capture(net.eval(), torch.randn(1, 3, 32, 32))["stages.0.blocks.0.mixer"]
    rows = attention_rows(call, [call.token(0.5, 0.5)])
    # One softmax is over 3 x 3 neighbours and the 2 x 2 tokens of the pooled map, each of 8 x 8 tokens.
    torch.testing.assert_close(rows.map.sum((2, 3)) + rows.outside, torch.ones(2, 1))
    pooled = rows.map[0, 0, ::15, ::15].repeat_interleave(8, 0).repeat_interleave(8, 1)
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[7:10, 7:10] = True
    torch.testing.assert_close(rows.map[0, 0][~near], pooled[~near])
    assert (rows.map[0, 0] > pooled + 1e-3)[near].all() and (pooled > 0).all()


def test_rows_of_several_queries_are_those_of_each():
    x = torch.randn(1, 4, 5, 16)
    call = Call(create_op("bilevel_routing", 16, 2, n_win=2, topk=1).eval(), (x,), {}, (4, 5), 0)
    together = all_rows(call, chunk=7).map
    assert together.shape == (2, 20, 4, 5)
    torch.testing.assert_close(together[:, 13], attention_rows(call, [13]).map[:, 0])


def test_a_query_attends_to_its_routes():
    call = make_call("bilevel_routing", topk=3)
    rows = attention_rows(call, [QUERY, 0]).map
    # Each query attends to three of the 49 windows of 2 x 2 tokens, with all of their tokens.
    windows = (rows > 0).unflatten(2, (7, 2)).unflatten(4, (7, 2)).sum((3, 5))
    assert windows.unique().tolist() == [0, 4] and ((windows == 4).sum((2, 3)) == 3).all()


def test_a_net_of_timm_with_registers():
    torch.manual_seed(0)
    net: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, reg_tokens=3
    ).eval()
    calls = capture(net, torch.randn(1, 3, 32, 32))
    assert list(calls) == ["blocks.0.attn", "blocks.1.attn"]
    call = calls["blocks.1.attn"]
    assert (call.size, call.extra, call.token(0.99, 0.3)) == ((4, 4), 4, 4 + 3 * 4 + 1)
    rows = attention_rows(call, [0, 7])
    assert rows.extra.shape == (2, 2, 4) and rows.map.shape == (2, 2, 4, 4)
    torch.testing.assert_close(rows.map.sum((2, 3)) + rows.extra.sum(2), torch.ones(2, 2))
    conv: Any = timm.create_model("resnet18")
    assert find_attention(conv) == []
    with pytest.raises(ValueError, match="ResNet has no attention that can be shown"):
        capture(conv.eval(), torch.randn(1, 3, 32, 32))
