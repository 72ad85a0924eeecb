"""Proxy-token attention of PT-DiT (Wang et al., arXiv:2409.04005).

Paper: Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task. Written after the paper; the
repository 360CVGroup/Qihoo-T2X holds no code of the attention. A block of the paper has a global part, window attention
and shifted-window attention one after another; that one op adds the global part and one of the two others is ours.
"""

from torch import Tensor, nn

from ops.functional import map_attention, window_attention
from ops.registry import FIRST, Place, register_op
from ops.weighting import Values
from ops.windows import pad_to_multiple, window_means

# Sides of the windows by stage, for some 4 x 4 to 8 x 8 proxies at an image of 224 pixels
WINDOWS = (7, 7, 4, 2)


@register_op("proxy_token")
class ProxyTokenAttention(nn.Module):
    """Window means, the proxies, attend to each other, and all tokens attend to them; windows of tokens attend inside.

    The global part is a self-attention of the proxies, a cross-attention of all tokens to its output, and a projection.
    The local part, attention inside the same windows, is added; it has projections of its own, and no positions. Where
    the windows do not fit the map, the last proxies are means of the tokens on the map, and the local part zero-pads
    the map on the right and at the bottom; padded tokens are attended to. Cost is H * W * (window² + proxies), plus the
    square of the number of proxies, H * W / window².

    Args:
        dim: Number of channels.
        num_heads: Number of heads.
        place: The stage sets the default of `window`, the block that of `shift`.
        window: Side of a window in tokens; by default 7, 7, 4 and 2 by stage. The paper takes 2, 4, 8 and 16 for images
            of 256 to 2048 pixels, which gives 8 x 8 proxies.
        shift: Number of tokens by which the windows of the local part are shifted, from 0 to window - 1; by default
            window // 2 in every second block of a stage, and 0 in the others.
        local: Add the local part; default True.
        zero_init: Start the projection of the global part at zeros, as the paper does; default False, since its other
            weights have no gradient as long as it is zero.

    Raises:
        ValueError: A number is out of its range.
    """

    family = "mixed"
    value_layers, output_layers = ("local_qkv",), ("local_proj", "cross_proj")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        place: Place = FIRST,
        window: int | None = None,
        shift: int | None = None,
        local: bool = True,
        zero_init: bool = False,
    ):
        super().__init__()
        window = WINDOWS[min(place.stage, 3)] if window is None else window
        shift = window // 2 * (place.block % 2) if shift is None else shift
        if not 0 <= shift < window:
            raise ValueError(f"window must be at least 1 and shift from 0 to window - 1, not {window} and {shift}")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.proxy_qkv, self.proxy_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.cross_q, self.cross_kv, self.cross_proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.values = Values()
        self.out = nn.Linear(dim, dim)
        if zero_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        self.local_qkv = nn.Linear(dim, 3 * dim) if local else None
        self.local_proj = nn.Linear(dim, dim) if local else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        window = (min(self.window, H), min(self.window, W))
        means = window_means(x, window).unsqueeze(1)  # (B, 1, P, C)
        q, k, v = self.proxy_qkv(means).chunk(3, dim=-1)
        proxies = self.proxy_proj(map_attention(q, k, v, self.num_heads))
        k, v = self.cross_kv(proxies).chunk(2, dim=-1)
        v = self.values(v, means)
        out = self.out(self.cross_proj(map_attention(self.cross_q(x), k, v, self.num_heads)))
        if self.local_qkv is None:
            return out
        shift = (self.shift if window[0] < H else 0, self.shift if window[1] < W else 0)
        qkv = self.local_qkv(pad_to_multiple(x, window)).unflatten(-1, (3, -1))
        return out + self.local_proj(window_attention(qkv, None, self.num_heads, window, shift)[:, :H, :W])
