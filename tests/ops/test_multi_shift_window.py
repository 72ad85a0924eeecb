"""Windows of a 2 x 2 partition with cyclic shifts equal dense attention under the mask that they induce."""

import pytest
import torch
import torch.nn.functional as F

from ops import Place, create_op
from ops.attention.multi_shift_window import resize


def masked(op, x, shift, wrap):
    """Compute the op by dense attention with a mask."""
    H, W = x.shape[1:3]
    shifts, places = [side // 8 * shift for side in (H, W)], []
    for side, s in zip((H, W), shifts, strict=True):
        rolled = [(i - s) % side // (side // 2) for i in range(side)]
        # Without wrapping, the side's first tokens that were rolled to its end are apart
        places.append([(window, not wrap and i < s) for i, window in enumerate(rolled)])
    tokens = [(row, column) for row in places[0] for column in places[1]]
    mask = torch.tensor([[a == b for b in tokens] for a in tokens])
    q, k, v = (t.flatten(1, 2).unflatten(-1, (op.num_heads, -1)).transpose(1, 2) for t in op.qkv(x).chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return op.proj(out.transpose(1, 2).flatten(2)).view(x.shape)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_tokens_attend_inside_their_window(block, wrap):
    torch.manual_seed(0)
    op = create_op("multi_shift_window", 8, 2, place=Place(block=block), wrap=wrap)
    x = torch.randn(2, 8, 16, 8)
    assert torch.allclose(op(x), masked(op, x, block, wrap), atol=1e-6)


def test_without_a_shift_the_quarters_of_the_map_are_independent():
    torch.manual_seed(0)
    op, full = create_op("multi_shift_window", 8, 2), create_op("full", 8, 2)
    full.load_state_dict(op.state_dict())
    x = torch.randn(2, 6, 4, 8)
    rows = [torch.cat([full(x[:, a : a + 3, b : b + 2]) for b in (0, 2)], dim=2) for a in (0, 3)]
    assert torch.allclose(op(x), torch.cat(rows, dim=1), atol=1e-6)


def test_odd_sides_are_enlarged_and_reduced_again():
    torch.manual_seed(0)
    op = create_op("multi_shift_window", 8, 2, shift=2)
    x = torch.randn(1, 9, 7, 8)
    assert torch.allclose(op(x), resize(op(resize(x, (10, 8))), (9, 7)), atol=1e-6)


def test_random_shifts_follow_the_generator_and_only_in_training():
    op = create_op("multi_shift_window", 8, 2, random=True)
    x, outputs = torch.randn(1, 8, 8, 8), []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(torch.stack([op(x) for _ in range(8)]))
    assert torch.equal(*outputs)
    assert len(outputs[0].flatten(1).unique(dim=0)) > 1
    op.eval()
    assert torch.equal(op(x), op(x))
    with pytest.raises(ValueError, match="shift must be from 0 to 3 quarters of a window, not 4"):
        create_op("multi_shift_window", 8, 2, shift=4)
