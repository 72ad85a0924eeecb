"""Tests of the choice of a back end for a while, and of the redirection of primitives."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ops import backend, create_op
from ops.functional import routed_attention, window_attention


def test_using_a_back_end_ends_with_the_previous_one_also_after_an_error():
    with pytest.raises(RuntimeError), backend.using("torch"):
        assert not backend.automatic()
        raise RuntimeError
    assert backend.automatic()


def test_using_an_unknown_back_end_is_an_error_and_changes_nothing():
    with pytest.raises(ValueError, match=r"not 'tritn'\. Did you mean 'triton'\?"), backend.using("tritn"):
        pass
    assert backend.automatic()


def test_an_op_computes_what_its_primitive_is_redirected_to():
    op, x = create_op("window", dim=32, num_heads=2), torch.randn(1, 14, 14, 32)
    calls = []

    def doubled(primitive, *args, **kwargs):
        calls.append(primitive.__name__)
        return 2 * primitive(*args, **kwargs)

    def refuse(primitive, *args, **kwargs):
        raise RuntimeError("not called by this op")

    expected = op(x)
    with backend.redirecting({"routed_attention": refuse}):
        with backend.redirecting({"window_attention": doubled}):
            redirected = op(x)
        assert torch.equal(op(x), expected)
    assert calls == ["window_attention"]
    assert not torch.allclose(redirected, expected)


def test_redirections_are_removed_after_an_error():
    def fail(primitive, *args):
        raise RuntimeError

    qkv = torch.randn(1, 4, 4, 3, 16)
    with pytest.raises(RuntimeError), backend.redirecting({"window_attention": fail}):
        window_attention(qkv, None, 2, (2, 2))
    assert window_attention(qkv, None, 2, (2, 2)).shape == (1, 4, 4, 16)


def test_a_compiled_primitive_follows_a_redirection():
    qkv, index = torch.randn(1, 4, 4, 48), torch.tensor([[[0, 1]] * 4])
    compiled = torch.compile(routed_attention, backend="eager", fullgraph=True)
    expected = routed_attention(qkv, index, (2, 2), 2, 0.5)
    torch.testing.assert_close(compiled(qkv, index, (2, 2), 2, 0.5), expected)
    with backend.redirecting({"routed_attention": lambda primitive, *args: -primitive(*args)}):
        torch.testing.assert_close(compiled(qkv, index, (2, 2), 2, 0.5), -expected)
    torch.testing.assert_close(compiled(qkv, index, (2, 2), 2, 0.5), expected)


@pytest.mark.parametrize(
    ("old", "capability", "runs"), [(True, (9, 0), True), (True, (10, 0), False), (False, (10, 0), True)]
)
def test_kernels_are_not_offered_where_the_installed_triton_cannot_compile_them(monkeypatch, old, capability, runs):
    monkeypatch.setattr(backend, "OLD_TRITON", old)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    obstacle = backend.obstacle_to_kernels(x, 32)
    assert obstacle is None if runs else obstacle and "needs torch 2.11 or newer" in obstacle
