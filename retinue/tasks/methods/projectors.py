"""Projectors: small nets between a backbone's features and a self-supervised loss, thrown away after pretraining.

Papers: SimCLR (Chen et al., ICML 2020, arXiv:2002.05709) and MoCo v3 (Chen et al., ICCV 2021, arXiv:2104.02057) for the
projectors with batch norm; DINO (Caron et al., ICCV 2021, arXiv:2104.14294) for the prototypes; AMCL (Wang et al., ECCV
2024, arXiv:2310.05615) for several projectors and temperatures of pairs. Written after the papers, and checked against
https://github.com/facebookresearch/moco-v3, https://github.com/facebookresearch/dino (Apache-2.0) and
https://github.com/LeiWangR/cl.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from retinue.tasks.methods.processes import gather, rank


class GatheredBatchNorm(nn.BatchNorm1d):
    """Batch norm of vectors (N, C) whose statistics are those of the rows of all processes, on CPUs and on GPUs.

    torch's SyncBatchNorm, by which `trainer.sync_batchnorm` replaces this module, does the same on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        rows = super().forward(gather(input))
        first = rank() * len(input)
        return rows[first : first + len(input)]


def projector(widths: Sequence[int], *, final_norm: bool = False) -> nn.Sequential:
    """Return an MLP on vectors (N, widths[0]) with batch norm and ReLU between its layers.

    Args:
        widths: Number of channels before each layer and after the last one.
        final_norm: End with a batch norm without scale and bias.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), GatheredBatchNorm(outputs), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    if final_norm:
        layers.append(GatheredBatchNorm(widths[-1], affine=False))
    return nn.Sequential(*layers)


class Projectors(nn.Module):
    """Several projectors of one shape side by side (AMCL's heads).

    Args:
        heads: C, number of projectors.
        widths: As in `projector`.
        final_norm: As in `projector`.
    """

    def __init__(self, heads: int, widths: Sequence[int], *, final_norm: bool = False):
        super().__init__()
        self.heads = nn.ModuleList([projector(widths, final_norm=final_norm) for _ in range(heads)])

    def forward(self, x: Tensor) -> Tensor:
        """Project vectors (N, widths[0]), or (C, N, widths[0]) with one part for each head, to (C, N, widths[-1])."""
        parts = x if x.ndim == 3 else [x] * len(self.heads)
        return torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)])


class PairTemperature(nn.Module):
    """AMCL's adaptive temperature: an MLP for each head turns a pair of projections to a temperature between limits.

    Args:
        heads: C, number of heads.
        dim: D, number of channels of a projection.
        limits: Minimum and maximum of a temperature, which the MLP's sigmoid approaches.
        hidden: Number of hidden channels of the MLP; the authors' code has 128.
    """

    def __init__(self, heads: int, dim: int, limits: tuple[float, float], *, hidden: int = 128):
        super().__init__()
        self.limits = limits
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(heads)]
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the temperatures (C, N) of N pairs, from their projections (C, N, D) and (C, N, D)."""
        low, high = self.limits
        pairs = torch.cat([first, second], dim=-1)
        scores = torch.stack([head(part)[:, 0] for head, part in zip(self.heads, pairs, strict=True)])
        return low + (high - low) * scores.float().sigmoid()


class PrototypeHead(nn.Module):
    """DINO's head: an MLP to a unit vector, whose scalar products with K prototypes are the scores.

    Args:
        in_dim: Number of channels of the backbone's features.
        prototypes: K; the paper has 65,536.
        hidden: Number of hidden channels of the MLP.
        bottleneck: Number of channels of the unit vector.
        unit_prototypes: Keep the prototypes on the unit sphere; otherwise their lengths are learnt.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        unit_prototypes: bool = True,
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        lengths = self.prototypes.get_parameter("parametrizations.weight.original0")
        nn.init.ones_(lengths)
        lengths.requires_grad_(not unit_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (N, K) of features (N, in_dim)."""
        return self.prototypes(F.normalize(self.mlp(x), dim=-1))
