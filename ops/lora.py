"""Low-rank changes of linear layers, with a gate as in LoLA-SpecViT or without."""

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """Linear layer plus a low-rank adapter (Hu et al., ICLR 2022, arXiv:2106.09685).

    The output is W x + b + sigmoid(G x) * (alpha / rank) * U D x + R x, where D maps to `rank` units. Without a gate
    the terms of G and R are left out, and the adapter can be folded into W.

    Args:
        in_features: Number of input channels.
        out_features: Number of output channels.
        bias: Give the layer a bias; default True.
        rank: Rank of the adapter.
        alpha: Scale of the adapter, relative to `rank`.
        gated: Whether there are the matrices G and R.
        freeze: Whether W and b stay as they are in training.
    """

    # The authors hold W and b in a layer of their own.
    renames = ((r"^linear\.", ""),)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 16,
        alpha: float = 32.0,
        gated: bool = True,
        freeze: bool = False,
    ):
        super().__init__(in_features, out_features, bias)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        self.scale, self.gated = alpha / rank, gated
        self.lora_down = nn.Linear(in_features, rank, bias=False)
        # The authors' net initialises U anew, so that the adapter acts from the start, unlike the usual U = 0.
        self.lora_up = nn.Linear(rank, out_features, bias=False)
        trunc_normal_(self.lora_up.weight, std=0.02)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        if gated:
            self.lora_gate = nn.Linear(in_features, out_features, bias=False)
            self.lora_residual = nn.Linear(in_features, out_features, bias=False)
        if freeze:
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    parameter.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        out, adapted = super().forward(input), self.lora_up(self.lora_down(input)) * self.scale
        if not self.gated:
            return out + adapted
        return out + torch.sigmoid(self.lora_gate(input)) * adapted + self.lora_residual(input)


def low_rank(in_features: int, out_features: int, rank: int) -> nn.Sequential:
    """Return a linear map of rank `rank` without a bias, to be added to the output of another layer.

    Both of its factors start at random, so that both are trained from the first step.

    Raises:
        ValueError: `rank` is less than 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    trunc_normal_(up.weight, std=0.02)
    return nn.Sequential(down, up)
