"""Local, coarse and global attention equal their definitions, and full attention in special cases."""

import math

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op


def windowed(op, qkv, rows, columns):
    """Compute dense attention (h, w, C) under the mask of a partition into rows x columns windows of equal size."""
    h, w = qkv.shape[:2]
    side = math.ceil(h / rows), math.ceil(w / columns)
    places = [(i // side[0], j // side[1]) for i in range(h) for j in range(w)]
    mask = torch.tensor([[a == b for b in places] for a in places])
    q, k, v = (t.flatten(0, 1).unflatten(-1, (op.num_heads, -1)).transpose(0, 1) for t in qkv.chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(0, 1).reshape(h, w, -1)


def compressed(branch, x):
    """Sum each cell's tokens with the branch's weights, relative to the number of tokens on the map."""
    (H, W), f = x.shape[:2], branch.compress.shape[0]
    out = torch.zeros(math.ceil(H / f), math.ceil(W / f), x.shape[2], dtype=x.dtype)
    for a in range(out.shape[0]):
        for b in range(out.shape[1]):
            cell = x[a * f : a * f + f, b * f : b * f + f]
            weight = branch.compress[: cell.shape[0], : cell.shape[1]]
            out[a, b] = (cell * weight).sum((0, 1)) * f**2 / (cell.shape[0] * cell.shape[1])
    return out


def defined(op, x):
    """Compute the op for one map (H, W, C)."""
    odd = op.odd

    def branch_output(branch, windows):
        small = compressed(branch, x)
        qkv = op.qkv(small) if branch.qkv is None else branch.qkv(small)
        if branch.change is not None:
            qkv = qkv + torch.cat([up(down(small)) for down, up in branch.change], -1)
        out = op.proj(windowed(op, qkv, *windows)).permute(2, 0, 1).unsqueeze(0)
        return branch.smooth(F.interpolate(out, x.shape[:2], mode="bilinear"))[0].permute(1, 2, 0)

    windows = [math.ceil(n / op.window) if op.window else op.windows for n in x.shape[:2]]
    out = op.proj(windowed(op, op.qkv(x), *(n + odd for n in windows)))
    pooled = isinstance(op.gate, torch.nn.Linear)
    gates = (op.gate(x.mean((0, 1))).view(-1, x.shape[2]) if pooled else op.gate).sigmoid()
    if op.coarse_branch is not None:
        coarse = branch_output(op.coarse_branch, [max(n // 2, 1) + odd for n in windows])
        out = gates[1] * coarse + (1 - gates[1]) * out
    return gates[0] * branch_output(op.global_branch, (1, 1)) + (1 - gates[0]) * out


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    "arguments",
    [
        {"windows": 4, "rank": 2},
        {"windows": 3, "compress": 2, "rank": 0, "gate": "pooled"},
        {"window": 3, "rank": "full"},
        {"windows": 2, "coarse": False},
        {"windows": 1, "compress": 2},
    ],
    ids=str,
)
def test_the_branches_are_mixed_as_defined(arguments, block):
    torch.manual_seed(0)
    op = create_op("dual_branch", 8, 2, place=Place(block=block), **arguments).double()
    for parameter in op.parameters():
        parameter.data.normal_(std=0.5)
    x = torch.randn(1, 9, 7, 8, dtype=torch.float64)
    assert torch.allclose(op(x)[0], defined(op, x[0]), atol=1e-12)


def test_one_window_without_compression_is_full_attention():
    torch.manual_seed(0)
    op, full = create_op("dual_branch", 8, 2, place=Place(stage=3)), create_op("full", 8, 2)
    full.load_state_dict(op.state_dict())
    x = torch.randn(2, 7, 5, 8)
    assert torch.allclose(op(x), full(x), atol=1e-6)


def test_the_branches_are_full_attention_in_special_cases():
    torch.manual_seed(0)
    op, full = create_op("dual_branch", 8, 2, windows=2, compress=1, rank=0, coarse=False), create_op("full", 8, 2)
    full.load_state_dict({name: value for name, value in op.state_dict().items() if name in full.state_dict()})
    branch = op.global_branch
    for conv, weight in zip(branch.smooth, (torch.zeros(8, 1, 3, 3), torch.eye(8)[:, :, None, None]), strict=True):
        conv.weight.data, conv.bias.data = weight, torch.zeros(8)
    branch.smooth[0].weight.data[:, :, 1, 1] = 1
    x = torch.randn(2, 6, 5, 8)
    # Gates of 1 leave the global branch alone
    op.gate.data.fill_(100)
    assert torch.allclose(op(x), full(x), atol=1e-5)
    # Gates of 0 leave one window
    local = create_op("dual_branch", 8, 2, windows=1, compress=2, coarse=False)
    local.load_state_dict(local.state_dict() | full.state_dict())
    local.gate.data.fill_(-100)
    assert torch.allclose(local(x), full(x), atol=1e-5)


def test_windows_and_cells_by_stage():
    ops = [create_op("dual_branch", 8, 2, place=Place(stage)) for stage in range(3)]
    assert [(op.windows, op.global_branch.compress.shape[0]) for op in ops] == [(4, 4), (4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": 4, "window": 7}, "windows and window cannot both be given, not 4 and 7"),
        ({"rank": "half"}, "rank must be at least 0 or 'full', not 'half'"),
        ({"gate": "fixed"}, "gate must be 'learned' or 'pooled', not 'fixed'"),
        ({"compress": 0}, "must be at least 1, not 4, None and 0"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_op("dual_branch", 8, 2, **arguments)
