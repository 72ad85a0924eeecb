"""Attentive pools of frozen tokens: efficient probing (EP), and the pools that it is compared with.

Every pool maps tokens (B, N, dim) to one vector for each image, (B, `out_dim`).

- `ep`: Psomas et al. 2025, Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency
  (arXiv:2506.10178, github.com/billpsomas/efficient-probing).
- `abmilp`: Ilse et al. 2018, Attention-based Deep Multiple Instance Learning (arXiv:1802.04712).
- `simpool`: Psomas et al. 2023, Keep It SimPool (arXiv:2309.06891).
- `siglip`: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training (arXiv:2303.15343); timm's module.
- `aim`: El-Nouby et al. 2024, Scalable Pre-training of Large Autoregressive Image Models (arXiv:2401.08541).
- `jepa`: Bardes et al. 2024, Revisiting Feature Prediction for Learning Visual Representations from Video
  (arXiv:2404.08471).
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, Mlp, trunc_normal_
from torch import Tensor, nn

from retinue.utils.suggestions import nearest


class EfficientProbing(nn.Module):
    """Learned queries attend to the tokens; each query pools its own slice of the values' channels.

    There are neither keys nor an output projection: the tokens themselves are the keys.

    Args:
        dim: Channels of the tokens.
        queries: Number of queries M.
        reduction: Factor o by which the values have fewer channels than the tokens.

    Raises:
        ValueError: M does not divide dim / o, or o does not divide dim.
    """

    renames = ((r"^cls_token$", "queries"), (r"^v\.", "value."))

    def __init__(self, dim: int, queries: int = 32, reduction: int = 1):
        super().__init__()
        if dim % (queries * reduction):
            raise ValueError(
                f"queries={queries} times reduction={reduction} must divide the {dim} channels of the tokens"
            )
        self.out_dim = dim // reduction
        self.scale = dim**-0.5
        self.queries = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.value = nn.Linear(dim, self.out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.scale * self.queries @ x.transpose(1, 2)).softmax(-1)  # (B, M, N)
        values = self.value(x).unflatten(-1, (weights.shape[1], -1))  # (B, N, M, out_dim / M)
        return torch.einsum("bmn,bnmc->bmc", weights, values).flatten(1)


class MultipleInstancePool(nn.Module):
    """Mean of the tokens with weights that a small MLP computes from each token.

    Args:
        dim: Channels of the tokens.
    """

    renames = ((r"^attention_predictor\.", "attention."),)

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim
        self.attention = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.attention(x).softmax(1) * x).sum(1)


class SimPool(nn.Module):
    """The mean of the tokens attends to the normalised tokens, which are the values too.

    Args:
        dim: Channels of the tokens.
    """

    renames = ((r"^norm_patches\.", "norm."), (r"^wq\.", "query."), (r"^wk\.", "key."))

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim
        self.scale = dim**-0.5
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x)
        query = self.scale * self.query(x.mean(1, keepdim=True))
        return ((query @ self.key(tokens).transpose(1, 2)).softmax(-1) @ tokens).squeeze(1)


class AimPool(nn.Module):
    """One learned query attends to the batch-normalised tokens in several heads; nothing projects the output.

    Args:
        dim: Channels of the tokens.
        num_heads: Attention heads; they must divide `dim`.
    """

    renames = ((r"^cls_token$", "query"), (r"^k\.", "key."), (r"^v\.", "value."), (r"^bn\.", "norm."))

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.out_dim, self.num_heads = dim, num_heads
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return attend(self.query.expand(x.shape[0], -1, -1), self.key(x), self.value(x), self.num_heads).squeeze(1)


class JepaPool(nn.Module):
    """One learned query in a transformer block: cross-attention to the tokens, and an MLP, each with a residual.

    Args:
        dim: Channels of the tokens.
        num_heads: Attention heads; they must divide `dim`.
    """

    renames = ((r"^query_tokens$", "query_token"), (r"^cross_attention_block\.(xattn\.)?", ""))

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.out_dim, self.num_heads = dim, num_heads
        self.query_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)
        trunc_normal_(self.query_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # The authors divide the output layers of their first block by sqrt(2).
        with torch.no_grad():
            self.proj.weight.div_(2**0.5)
            self.mlp.fc2.weight.div_(2**0.5)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query_token.expand(x.shape[0], -1, -1)
        keys, values = self.kv(self.norm1(x)).chunk(2, -1)
        query = query + self.proj(attend(self.q(query), keys, values, self.num_heads))
        return (query + self.mlp(self.norm2(query))).squeeze(1)


class SiglipPool(AttentionPoolLatent):
    """timm's attention pool with a latent query, 8 heads and an MLP.

    Args:
        dim: Channels of the tokens.
        num_heads: Attention heads; they must divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads=num_heads)
        self.out_dim = dim


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Return softmax attention of queries (B, M, C) to keys and values (B, N, C) in heads: (B, M, C)."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# Arguments of each pool that a probe may set.
POOLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "ep": (EfficientProbing, ("queries", "reduction")),
    "abmilp": (MultipleInstancePool, ()),
    "simpool": (SimPool, ()),
    "siglip": (SiglipPool, ("num_heads",)),
    "aim": (AimPool, ("num_heads",)),
    "jepa": (JepaPool, ("num_heads",)),
}


def create_pool(name: str, dim: int, queries: int = 32, reduction: int = 1, num_heads: int = 12) -> Any:
    """Return a pool of tokens (B, N, dim), a module with the attribute `out_dim`.

    Args:
        name: A key of `POOLS`.
        dim: Channels of the tokens.
        queries: Queries of `ep`.
        reduction: Factor by which the output of `ep` has fewer channels than the tokens.
        num_heads: Attention heads of `siglip`, `aim` and `jepa`.

    Raises:
        ValueError: The name is unknown, or an argument does not divide `dim`.
    """
    if name not in POOLS:
        raise ValueError(f"no pool is called {name!r}.{nearest(name, POOLS)} There are: {', '.join(POOLS)}")
    pool, taken = POOLS[name]
    if "num_heads" in taken and dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the {dim} channels of the tokens")
    given = {"queries": queries, "reduction": reduction, "num_heads": num_heads}
    return pool(dim, **{key: given[key] for key in taken})
