"""Test that our trainer and the bare loop do the same work."""

import torch

from retinue.benchmarks import trainer


def test_both_sides_do_the_same_work():
    net, bare = trainer.train_both("resnet10t", 32, 4, torch.device("cpu"), steps=2, rounds=3)
    trained, bare_trained = net.state_dict(), bare.net.state_dict()
    assert trained["bn1.num_batches_tracked"] == 6
    for name, value in bare_trained.items():
        torch.testing.assert_close(trained[name], value, msg=name)
    assert len(bare.trainer_seconds) == len(bare.bare_seconds) == 3
