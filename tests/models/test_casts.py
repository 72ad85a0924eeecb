"""Casts of weights under autocast."""

from collections import Counter

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models  # noqa: F401  (registers our nets)


class CastCounter(TorchDispatchMode):
    """Count the casts of parameters to bfloat16 by the parameter's name."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in net.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr(), "")] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["biformer_nano", "swin_nano"])
def test_no_weight_is_cast_twice_in_a_step(name):
    net = timm.create_model(name)
    with CastCounter(net) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(torch.randn(1, 3, 32, 32)).sum()
        loss.backward()
    del counter.counts[""]
    assert len(counter.counts) > 10 and set(counter.counts.values()) == {1}
