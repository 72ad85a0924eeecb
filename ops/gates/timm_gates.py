"""Gates of timm (Apache-2.0), under the names by which `timm.layers.create_attn` knows them.

Their arguments are those of timm's classes, such as `{name: se, rd_ratio: 0.25}`.
"""

from timm.layers.cbam import CbamModule, LightCbamModule
from timm.layers.coord_attn import CoordAttn, SimpleCoordAttn, StripAttn
from timm.layers.eca import CecaModule, EcaModule
from timm.layers.global_context import GlobalContext
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule

from ops.gate_registry import register_gate


@register_gate("cbam")
class Cbam(CbamModule):
    """Values are weighted by channel, from mean and maximum over places, then by place, from those over channels.

    CBAM (Woo et al., ECCV 2018, arXiv:1807.06521).
    """


@register_gate("ceca")
class CircularEca(CecaModule):
    """A channel's factor follows from the means of the channels next to it, the first one next to the last.

    Circular variant of ECA (Wang et al., CVPR 2020, arXiv:1910.03151), of timm.
    """


@register_gate("coord")
class CoordinateAttention(CoordAttn):
    """Each value is weighted by factors of its row and of its column, from a bottleneck of the row and column means.

    Coordinate attention (Hou et al., CVPR 2021, arXiv:2103.02907).
    """


@register_gate("eca")
class Eca(EcaModule):
    """A channel's factor follows from the means of the channels next to it, by a 1-D convolution along the channels.

    ECA (Wang et al., CVPR 2020, arXiv:1910.03151).
    """


@register_gate("ese")
class EffectiveSe(EffectiveSEModule):
    """A channel's factor follows from the means of all channels by one linear layer.

    Effective SE of VoVNetV2 (Lee and Park, CVPR 2020, arXiv:1911.06667).
    """


@register_gate("gc")
class GlobalContextGate(GlobalContext):
    """A channel's factor follows by two linear layers from a mean of the map with weights of a softmax over places.

    GCNet (Cao et al., 2019, arXiv:1904.11492) with factors in place of terms, of timm.
    """


@register_gate("lcbam")
class LightCbam(LightCbamModule):
    """Values are weighted by channel, then by place; means and maxima are added before the layers that read them.

    Light variant of CBAM (Woo et al., ECCV 2018, arXiv:1807.06521), of timm.
    """


@register_gate("scoord")
class SimpleCoordinateAttention(SimpleCoordAttn):
    """Each value is weighted by a factor of its row and column together, from two linear layers on their means.

    Simpler variant of coordinate attention (Hou et al., CVPR 2021, arXiv:2103.02907), of timm.
    """


@register_gate("se")
class SqueezeExcitation(SEModule):
    """A channel's factor follows from the means of all channels by two linear layers.

    SE (Hu et al., CVPR 2018, arXiv:1709.01507).
    """


@register_gate("strip")
class StripAttention(StripAttn):
    """Each value is weighted by a factor of its row and column together, from a convolution along their means.

    Strip attention of timm.
    """
