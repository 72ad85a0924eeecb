"""Agent attention equals its definition, written as loops."""

import math

import pytest
import torch

from ops import Place, create_op


def interpolation(source: int, target: int) -> torch.Tensor:
    """Return the matrix (target, source) that interpolates linearly from the centres of source to target cells."""
    weights = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        position = min(max((i + 0.5) * source / target - 0.5, 0), source - 1)
        low = math.floor(position)
        weights[i, low] += 1 - (position - low)
        weights[i, min(low + 1, source - 1)] += position - low
    return weights


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(("size", "pool"), [((6, 4), None), ((5, 9), None), ((3, 8), 3)], ids=str)
def test_agent_attends_as_defined(size, pool, extra):
    torch.manual_seed(0)
    (H, W), a, P = size, 2, pool or 2
    op = create_op("agent", dim=6, num_heads=2, place=Place(extra=extra), agents=a, pool=pool, size=(6, 4)).double()
    for name in ("an", "na", "ah", "aw", "ha", "wa", *(("ac", "ca") if extra else ())):
        torch.nn.init.normal_(getattr(op, f"{name}_bias"))
    x, extra_tokens = torch.randn(1, H, W, 6).double(), torch.randn(1, extra, 6).double()
    q, k, v = op.qkv(torch.cat([extra_tokens, x.flatten(1, 2)], dim=1))[0].chunk(3, -1)

    q_map = q[extra:].unflatten(0, size)
    # An agent is the mean of the queries in one cell of a P x P grid over the map
    agents = []
    for i in range(P):
        for j in range(P):
            rows = slice(i * H // P, math.ceil((i + 1) * H / P))
            columns = slice(j * W // P, math.ceil((j + 1) * W / P))
            agents.append(q_map[rows, columns].flatten(0, 1).mean(0))

    grid = interpolation(a, P)
    regrid = torch.einsum("ga,hb->ghab", grid, grid).reshape(P**2, a**2)  # (P², a²)
    R, C = interpolation(6, H), interpolation(4, W)
    coarse = interpolation(7, H), interpolation(7, W)
    biases = {}
    for direction, table, rows, columns in (
        ("gather", op.an_bias, op.ah_bias[..., 0], op.aw_bias[:, :, 0]),
        ("scatter", op.na_bias, op.ha_bias[:, :, 0].mT, op.wa_bias[:, 0].mT),
    ):
        bias = torch.einsum("ir,jc,harc->haij", *coarse, table)
        bias = bias + (rows @ R.T)[..., None] + (columns @ C.T)[:, :, None]
        biases[direction] = torch.einsum("pa,haij->hpij", regrid, bias).flatten(2)
    if extra:
        for direction, table in (("gather", op.ac_bias), ("scatter", op.ca_bias.mT)):
            extra_bias = torch.einsum("pa,hae->hpe", regrid, table)
            biases[direction] = torch.cat([extra_bias, biases[direction]], dim=-1)

    heads = []
    for h, part in enumerate((slice(0, 3), slice(3, 6))):
        A = torch.stack(agents)[:, part]
        gathered = (A @ k[:, part].T / math.sqrt(3) + biases["gather"][h]).softmax(-1) @ v[:, part]
        heads.append((q[:, part] @ A.T / math.sqrt(3) + biases["scatter"][h].T).softmax(-1) @ gathered)
    out = torch.cat(heads, dim=-1)
    local = op.dwc(v[extra:].T.unflatten(1, size)[None])[0].flatten(1).T
    out = op.proj(out + torch.cat([torch.zeros(extra, 6), local]))

    actual = op(x, extra_tokens) if extra else (op(x), extra_tokens)
    assert torch.allclose(actual[0][0], out[extra:].unflatten(0, size), atol=1e-12)
    assert not extra or torch.allclose(actual[1][0], out[:extra], atol=1e-12)


def test_default_agents_and_size_follow_from_the_place():
    assert [create_op("agent", 8, 2, place=Place(stage)).agents for stage in range(4)] == [3, 4, 7, 7]
    assert create_op("agent", 8, 2, place=Place(stride=16)).ah_bias.shape[2] == 14
    with pytest.raises(ValueError, match="agents, pool and size must be at least 1, not 0"):
        create_op("agent", 8, 2, agents=0)
