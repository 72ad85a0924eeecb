"""Attention rows of every op of the registry: shown or refused, and known answers where ops differ in how they mix."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ops import create_op
from ops.registry import FAMILIES, FIRST, Place, create_context, family_of, list_ops
from ops.selective_scan import SS2D
from retinue.evaluation.sight.attention import WITHOUT_ATTENTION, Call, capture
from retinue.evaluation.sight.rows import Rows, attention_rows

ROOT = Path(__file__).resolve().parents[4]
# Ops that mix tokens before they compute values -> what the error says
MIXED_BEFORE = {
    "factorization": "no layer computes values of tokens",
    "varying_window": "it mixes tokens before it computes values",
}
# Ops that have attention only in later stages -> what the error says in the first one
WITHOUT_IN_FIRST_STAGE = {
    "multi_head_relation": "but by convolutions",
    "partial_visual": "no layer computes values of tokens",
}
# Ops whose shown weights need not sum to 1: linear attention, scans, gates, attention without a softmax, two
# softmaxes, and padding without a value
FREE_SUMS = {
    "aggregated", "atrous_scan", "chunk_recurrence", "enhanced_linear", "flow", "gated_linear_window",
    "grouped_differential", "halo", "lightning", "local_scan", "mixture_of_heads", "multi_head_scan",
    "overlapping_cross", "saliency_window", "softmax_free", "varied_size_window",
}  # fmt: skip


class Net(nn.Module):
    """Net of one op that reads a random map whatever the image is."""

    feature_info = ({"reduction": 1},)

    def __init__(self, name: str, size: tuple[int, int], place: Place, dim: int = 16, heads: int = 2, **arguments: Any):
        super().__init__()
        torch.manual_seed(0)
        self.mixer = create_op(name, dim, heads, place=place, **arguments).eval()
        self.x = torch.randn(1, *size, dim)
        self.context = {}
        if getattr(self.mixer, "make_context", None) is not None:
            with torch.no_grad():
                self.context = {"context": create_context(name, dim, heads, place=place).eval()(self.x)}

    def forward(self, image: Tensor) -> Tensor:
        return self.mixer(self.x, **self.context)


def rows_of(
    name: str, size: tuple[int, int], query: tuple[int, int], place: Place = FIRST, **arguments: Any
) -> dict[str, Rows]:
    net = Net(name, size, place, **arguments)
    calls = capture(net, torch.zeros(1, 3, *size))
    return {part: attention_rows(call, [query[0] * size[1] + query[1]]) for part, call in calls.items()}


@pytest.mark.parametrize("name", list_ops())
def test_every_op_is_shown_or_says_why_not(name: str):
    refusals = {
        **MIXED_BEFORE,
        **{op: f"family {family_of(op)}" for op in list_ops() if family_of(op) in WITHOUT_ATTENTION},
    }
    last, first = Place(3, 1, 2, 32), Place(0, 0, 2, 4)
    if name in WITHOUT_IN_FIRST_STAGE:
        with pytest.raises(ValueError, match=WITHOUT_IN_FIRST_STAGE[name]):
            rows_of(name, (9, 5), (4, 2), first)
    if name in refusals:
        with pytest.raises(ValueError, match=refusals[name]):
            rows_of(name, (9, 5), (4, 2), last)
        return
    for place in (last,) if name in WITHOUT_IN_FIRST_STAGE else (last, first):
        shown = rows_of(name, (9, 5), (4, 2), place)
        assert shown
        for rows in shown.values():
            sums = rows.map.sum((2, 3)) + rows.outside
            assert rows.map.isfinite().all() and rows.map.abs().max() > 0
            assert name in FREE_SUMS or torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_the_docs_name_the_ops_that_refuse():
    lines = (ROOT / "docs/sight.md").read_text().split("These ops refuse in one line:")[1].split("An op's own file")[0]
    named = set(re.findall(r"`(\w+)`", lines)) & {*list_ops(), *FAMILIES}
    assert named == {*WITHOUT_ATTENTION, *MIXED_BEFORE, *WITHOUT_IN_FIRST_STAGE}


def square(rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(14, 14, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


ALL = square(slice(None), slice(None))
WINDOW = square(slice(0, 7), slice(7, 14))
# Op -> the tokens that the query (5, 9) of a map of 14 x 14 tokens attends to, in each head
SEEN = {
    "cascaded_group": [WINDOW, WINDOW],
    "cluster_routing": [square(slice(2, 9), slice(6, 13)), None],
    "dual_branch": [square(slice(4, 8), slice(8, 12))] * 2 + [square(slice(0, 8), slice(8, 14))] * 2 + [ALL] * 2,
    "grouped_differential": [WINDOW, WINDOW],
    # Blocks of 8 x 8 tokens, and 3 tokens around
    "halo": [square(slice(0, 11), slice(5, 14))] * 2,
    "hilo": [ALL, square(slice(4, 6), slice(8, 10))],
    "lightning": [ALL, ALL],
    "msa_conv": [square(slice(4, 7), slice(8, 11))],
    "proxy_token": [ALL, ALL, WINDOW, WINDOW],
    "relative_conv": [WINDOW, WINDOW],
    "selective": [WINDOW, WINDOW],
    "single_head": [ALL],
}


@pytest.mark.parametrize("name", SEEN)
def test_a_query_attends_to_the_right_places(name: str):
    rows = rows_of(name, (14, 14), (5, 9))["mixer"].map[:, 0]
    assert len(rows) == len(SEEN[name])
    for row, seen in zip(rows, SEEN[name], strict=True):
        assert seen is None or torch.equal(row != 0, seen)
    if name == "proxy_token":
        # The weight of a proxy is shared by the tokens of its window.
        windows = rows[0].unflatten(0, (2, 7)).unflatten(2, (2, 7))
        torch.testing.assert_close(windows, windows[:, :1, :, :1].expand_as(windows))


def test_heads_of_a_cascade_are_their_softmax():
    net = Net("cascaded_group", (7, 7), Place())
    op, tokens = net.mixer, net.x.flatten(1, 2)
    rows = attention_rows(capture(net, torch.zeros(1, 3, 7, 7))["mixer"], [10]).map[:, 0]
    out: Any = 0.0
    for head in range(2):
        q, k, v = op.qkvs[head](tokens[..., 8 * head : 8 * head + 8] + out).split((16, 16, 8), dim=-1)
        q = op.dws[head](q.view(1, 7, 7, 16).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        weights = (q @ k.transpose(1, 2) / 4).softmax(-1)
        out = weights @ v
        torch.testing.assert_close(rows[head].flatten(), weights[0, 10].detach(), rtol=1e-5, atol=1e-7)


def test_the_columns_of_a_recurrence_are_the_rows_of_the_transposed_map():
    rows = []
    for columns in (False, True):
        net = Net("chunk_recurrence", (5, 7) if columns else (7, 5), Place(), columns=columns)
        net.x = torch.randn(1, 7, 5, 16, generator=torch.Generator().manual_seed(1))
        net.x = net.x.transpose(1, 2) if columns else net.x
        H, W = net.x.shape[1:3]
        query = (2 * W + 6) if columns else (6 * W + 2)
        rows.append(attention_rows(capture(net, torch.zeros(1, 3, H, W))["mixer"], [query]).map[:, 0])
    torch.testing.assert_close(rows[1], rows[0].transpose(1, 2))
    assert rows[0].std() > 1e-3


def test_a_selective_scan_is_the_product_of_its_steps():
    torch.manual_seed(0)
    scan, size, query = SS2D(4, 2, 1.0, 3).double().eval(), (3, 4), 7
    orders = torch.stack([torch.randperm(12) for _ in range(4)])
    x = torch.randn(1, *size, 4).double()
    rows = attention_rows(Call(scan, (x, orders), {}, size, 0), [query]).map[0, 0].flatten()
    u = torch.nn.functional.silu(
        scan.conv2d(scan.in_proj(x).chunk(2, dim=-1)[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # pyright: ignore[reportOptionalCall]
    )
    _, delta, A, B, C = (t[0] if t.ndim == 4 else t for t in scan.scan.arguments(u, orders))
    expected = torch.zeros(12, 4).double()
    for k, order in enumerate(orders.tolist()):
        last = order.index(query)
        for j in range(last + 1):
            decay = (delta[k, j + 1 : last + 1].sum(0)[:, None] * A[k]).exp()  # (E, S)
            expected[order[j]] += (C[k, last] * decay * B[k, j]).sum(1) * delta[k, j]
    torch.testing.assert_close(rows, expected.mean(1).detach())


def test_windows_of_a_net_of_timm_are_placed_on_the_map():
    torch.manual_seed(0)
    net: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,)
    ).eval()
    for block in net.layers[0].blocks:
        nn.init.zeros_(block.attn.qkv.weight[:16])
        nn.init.zeros_(block.attn.qkv.bias[:16])
        nn.init.zeros_(block.attn.relative_position_bias_table)
    calls = capture(net, torch.randn(1, 3, 32, 32))
    rows = [attention_rows(call, [8 * 1 + 6]).map[:, 0] for call in calls.values()]
    # The query is at (1, 6) of 8 x 8 tokens. The second block's windows are shifted by 2, and cut at the border.
    expected = torch.zeros(2, 8, 8)
    expected[0, 0:4, 4:8], expected[1, 0:2, 6:8] = 1 / 16, 1 / 4
    for found, right in zip(rows, expected, strict=True):
        torch.testing.assert_close(found, right.expand(2, -1, -1))
