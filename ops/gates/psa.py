"""Polarized self-attention, PSA (Liu et al., 2021, arXiv:2107.00782).

Written after the paper and what the authors' repository, DeLightCMU/PSA (Apache-2.0), computes.
"""

from torch import Tensor, nn

from ops.gate_registry import register_gate

FORMS = ("parallel", "sequential")


@register_gate("psa")
class PolarizedSelfAttention(nn.Module):
    """Values are weighted by channel, after attention pooling over the map, and by place, after mean pooling.

    The factors of the channels follow from a mean of the map with weights of a softmax over all places. The factor of a
    place follows from the product of its features with the mean features of the map. Both use half of the channels.
    In the authors' HRNet the gate stands after the first 3 x 3 convolution of a residual block.

    Args:
        dim: Number of channels, at least 2.
        form: "parallel" (default) adds the maps that both weightings give; "sequential" weights by place what the
            weighting by channel gives.
    """

    at = "conv"
    renames = (
        (r"^conv_q_right\.", "channel_query."),
        (r"^conv_v_right\.", "channel_value."),
        (r"^conv_up\.", "channel_factors."),
        (r"^conv_q_left\.", "place_query."),
        (r"^conv_v_left\.", "place_value."),
    )

    def __init__(self, dim: int, form: str = "parallel"):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be 'parallel' or 'sequential', not {form!r}")
        half, hidden = dim // 2, max(dim // 8, 1)
        self.parallel = form == "parallel"
        self.channel_query = nn.Conv2d(dim, 1, 1, bias=False)
        self.channel_value = nn.Conv2d(dim, half, 1, bias=False)
        self.channel_factors = (
            nn.Conv2d(half, dim, 1, bias=False)
            if self.parallel
            else nn.Sequential(
                nn.Conv2d(half, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, dim, 1)
            )
        )
        self.place_query = nn.Conv2d(dim, half, 1, bias=False)
        self.place_value = nn.Conv2d(dim, half, 1, bias=False)
        for conv in (self.channel_query, self.channel_value, self.place_query, self.place_value):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        by_channel = x * self.weigh_channels(x)
        if self.parallel:
            return by_channel + x * self.weigh_places(x)
        return by_channel * self.weigh_places(by_channel)

    def weigh_channels(self, x: Tensor) -> Tensor:
        """Return the factors of the channels, (B, C, 1, 1)."""
        weights = self.channel_query(x).flatten(2).softmax(-1)
        pooled = self.channel_value(x).flatten(2) @ weights.transpose(1, 2)
        return self.channel_factors(pooled.unsqueeze(3)).sigmoid()

    def weigh_places(self, x: Tensor) -> Tensor:
        """Return the factors of the places, (B, 1, H, W)."""
        # The mean comes before the convolution of one pixel, which is linear.
        query = self.place_query(x.mean((2, 3), keepdim=True)).flatten(1).unsqueeze(1)
        values = self.place_value(x).flatten(2)
        scores = (query @ values).softmax(-1) if self.parallel else query @ values.softmax(-1)
        return scores.sigmoid().unflatten(2, x.shape[2:])
