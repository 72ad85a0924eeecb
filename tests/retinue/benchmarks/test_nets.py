"""Tests of whole ops and nets with several formulations of attention."""

import pytest
import torch

from retinue.benchmarks import nets
from retinue.benchmarks.formulations import FORMULATIONS, Formulation
from tests.retinue.benchmarks.examples import wrong_routed_attention


def test_an_op_has_the_peers_of_the_primitives_that_it_calls():
    subject = nets.make_subject("bilevel_routing", (56, 56), 1, "cpu", "float32")
    assert subject.formulations() == ["", "gather, matmul, softmax"] and subject.shape == (1, 14, 14, 64)
    assert nets.check(subject, subject.formulations())[""] < 2
    assert nets.make_subject("agent", (56, 56), 1, "cpu", "float32").formulations() == [""]
    assert subject.primitives() == ["routed_attention"]
    assert nets.make_subject("multi_head_scan", (56, 56), 1, "cpu", "float32").primitives() == ["selective_scan"]


def test_a_net_has_the_peers_of_its_ops_and_timms_net_at_224_pixels():
    subject = nets.make_subject("swin_tiny", (224, 224), 1, "cpu", "float32")
    assert subject.formulations() == ["", "cut, matmul, softmax", "timm"]


def test_an_op_with_wrong_attention_is_not_measured(monkeypatch):
    subject = nets.make_subject("bilevel_routing", (56, 56), 1, "cpu", "float32")
    monkeypatch.setitem(FORMULATIONS["routed_attention"], "wrong", Formulation(wrong_routed_attention))
    with pytest.raises(ValueError, match=r"bilevel_routing errs .* more than 2: 1 x 14 x 14 x 64, float32"):
        nets.check(subject, ["wrong"])


def test_a_second_net_repeats_the_routes_of_the_first():
    routes, used = [], []

    def attend(qkv, index, *args):
        used.append(index)
        return qkv

    qkv = torch.zeros(1)
    for net in ("first", "second"):
        redirection = nets.with_recorded_routes(routes)
        for layer in range(2):
            redirection(attend, qkv, f"{net} {layer}")
    assert used == ["first 0", "first 1"] * 2
