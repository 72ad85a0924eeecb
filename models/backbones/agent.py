"""Agent-DeiT, Agent-PVT, Agent-Swin and Agent-CSwin (Han et al., ECCV 2024, arXiv:2312.08874).

Paper: Agent Attention: On the Integration of Softmax and Linear Attention. Written after the paper and the authors'
repository, LeapLabTHU/Agent-Attention (no licence of its own); its checkpoints load. The authors' dense nets have more
agents: `pool=(9, 12, 14, 7)`, (9, 12, 7, 7) for UPerNet on Agent-Swin-S, and (12, 16, 28, 28) for Agent-PVT.
"""

from collections.abc import Sequence

from timm.models import generate_default_cfgs, register_model

from models.backbones.cswin import CSWin
from models.backbones.deit import DeiT, deit_cfg
from models.backbones.pvt import PVT, pvt_cfg
from models.backbones.swin import Swin
from models.hierarchical import imagenet_cfg
from models.layers.position import grid_of
from ops.registry import Spec


def agent_mixers(
    agent_blocks: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    img_size: int | tuple[int, int],
    other: Spec = "full",
    agents: int | None = None,
    pool: Sequence[int] | None = None,
) -> list[list[Spec]]:
    """Return mixers with agent attention in the leading blocks of each stage and another op in the others.

    Args:
        agent_blocks: Number of leading blocks with agent attention in each stage.
        depths: Number of blocks in each stage.
        strides: Stride of each stage's map relative to the image, in pixels.
        img_size: Side or (height, width) in pixels of the images that the biases are learned for.
        other: Op of the other blocks.
        agents: Side of the grid of agents that the biases are learned for. Default: the op's own.
        pool: Side of the grid of agents in each stage, for which the biases are interpolated. Default: `agents`.
    """
    mixers = []
    for i, (count, depth, stride) in enumerate(zip(agent_blocks, depths, strides, strict=True)):
        size = grid_of(img_size, stride)
        agent: Spec = {"name": "agent", "size": size, "agents": agents, "pool": None if pool is None else pool[i]}
        mixers.append([agent if block < count else other for block in range(depth)])
    return mixers


class AgentDeiT(DeiT):
    """DeiT with agent attention in the leading blocks and full attention in the others.

    Args:
        img_size: Side or (height, width) in pixels of the images that positions and biases are learned for.
        patch: Side of a patch in pixels.
        depths: Number of blocks, as one entry.
        agent_blocks: Number of leading blocks with agent attention, as one entry, such as (4,). Default: all blocks.
        agents: Side of the grid of agents.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `PlainBackbone`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch: int = 16,
        depths: Sequence[int] = (12,),
        agent_blocks: Sequence[int] | None = None,
        agents: int = 7,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            agent_blocks = depths if agent_blocks is None else agent_blocks
            mixers = agent_mixers(agent_blocks, depths, [patch], img_size, agents=agents)
        super().__init__(img_size=img_size, patch=patch, depths=depths, mixers=mixers, **kwargs)


class AgentPVT(PVT):
    """PVT with agent attention, without a class token and without a norm before the classifier.

    Args:
        img_size: Side or (height, width) in pixels of the images that positions and biases are learned for.
        depths: Number of blocks in each stage.
        pool: Side of the grid of agents in each stage. Default: (3, 4, 7, 7).
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: agent attention.
        **kwargs: Further arguments of `PVT`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (2, 2, 2, 2),
        pool: Sequence[int] | None = None,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            mixers = agent_mixers(depths, depths, (4, 8, 16, 32), img_size, pool=pool)
        super().__init__(img_size=img_size, depths=depths, mixers=mixers, class_token=False, final_norm=False, **kwargs)


class AgentSwin(Swin):
    """Swin with agent attention in the leading blocks of each stage and shifted windows in the others.

    Args:
        img_size: Side or (height, width) in pixels of the images that the biases are learned for.
        depths: Number of blocks in each stage.
        agent_blocks: Number of leading blocks with agent attention in each stage.
        pool: Side of the grid of agents in each stage. Default: (3, 4, 7, 7).
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `Swin`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (2, 2, 6, 2),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        pool: Sequence[int] | None = None,
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            window = {"name": "window", "window": max(7, *grid_of(img_size, 32))}
            mixers = agent_mixers(agent_blocks, depths, (4, 8, 16, 32), img_size, window, pool=pool)
        super().__init__(depths=depths, mixers=mixers, **kwargs)


class AgentCSwin(CSWin):
    """CSwin with agent attention in the first two stages and cross-shaped windows in the others.

    Args:
        img_size: Side or (height, width) in pixels of the images that biases and strips are made for.
        depths: Number of blocks in each stage.
        mixers: Token mixers, as `ops.parse_mixers` reads them. Default: as above.
        **kwargs: Further arguments of `CSWin`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (2, 4, 18, 1),
        mixers: Spec | Sequence | None = None,
        **kwargs,
    ):
        if mixers is None:
            agent = [{"name": "agent", "size": grid_of(img_size, stride)} for stride in (4, 8)]
            strips = {"name": "cross_shaped_window", "split": max(7, *grid_of(img_size, 32))}
            mixers = [*agent, strips, "cross_shaped_window"]
        super().__init__(depths=depths, mixers=mixers, **kwargs)


def sized_cfg(url: tuple[str, str]) -> dict:
    """Return the `default_cfgs` entry of a net whose tables of biases belong to one image size."""
    return imagenet_cfg(url, fixed_input_size=True)


def _url(share: str, name: str) -> tuple[str, str]:
    return f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1", f"{name}.pth"


default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(_url(share, name))
        for name, cfg, share in (
            ("agent_deit_tiny", deit_cfg, "57e0904221824ee7b7af"),
            ("agent_deit_small", deit_cfg, "fdd43304372541db8ea7"),
            ("agent_deit_base", deit_cfg, "5115f15fdd7e4ab58fbc"),
            ("agent_pvt_tiny", pvt_cfg, "13fdf0e0a7c5498c934f"),
            ("agent_pvt_small", pvt_cfg, "36b8be9a8863456685a3"),
            ("agent_pvt_medium", pvt_cfg, "4d00ecacf18b45f9b88c"),
            ("agent_pvt_large", pvt_cfg, "040cfe0cfbbe4762ad09"),
            ("agent_swin_tiny", sized_cfg, "a2ddc1190c224f768a41"),
            ("agent_swin_small", sized_cfg, "f607172c9fea4d6e99bb"),
            ("agent_swin_base", sized_cfg, "4fcd2d0114bb490483c3"),
            ("agent_cswin_tiny", sized_cfg, "8c562a74441e46d5902b"),
            ("agent_cswin_small", sized_cfg, "30eb8af675bc4b7a8747"),
            ("agent_cswin_base", sized_cfg, "c8035b0839b2410c8c9f"),
        )
    }
)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeiT:
    return AgentDeiT.build("agent_deit_tiny", pretrained, **{"dim": 192, "heads": 3} | kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeiT:
    return AgentDeiT.build("agent_deit_small", pretrained, **{"dim": 384, "heads": 6} | kwargs)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeiT:
    return AgentDeiT.build("agent_deit_base", pretrained, **{"agent_blocks": (4,), "agents": 9} | kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPVT:
    return AgentPVT.build("agent_pvt_tiny", pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPVT:
    return AgentPVT.build("agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3)} | kwargs)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPVT:
    return AgentPVT.build("agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3)} | kwargs)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPVT:
    return AgentPVT.build("agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3)} | kwargs)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    return AgentSwin.build("agent_swin_tiny", pretrained, **kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    arguments = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
    return AgentSwin.build("agent_swin_small", pretrained, **arguments | kwargs)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    arguments = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "agent_blocks": (2, 2, 2, 0)}
    return AgentSwin.build("agent_swin_base", pretrained, **arguments | kwargs)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSwin:
    return AgentCSwin.build("agent_cswin_tiny", pretrained, **kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSwin:
    return AgentCSwin.build("agent_cswin_small", pretrained, **{"depths": (3, 6, 29, 2)} | kwargs)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSwin:
    arguments = {"dim": 96, "depths": (3, 6, 29, 2), "heads": (4, 8, 16, 32)}
    return AgentCSwin.build("agent_cswin_base", pretrained, **arguments | kwargs)
