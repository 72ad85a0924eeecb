"""EoMT on plain ViTs of ours and of timm's: masks, their annealing, and predictions."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.models.heads import stir
from tests.models.openmmlab import CLASSES, build
from tests.models.openmmlab.test_build import losses, without_gradient

# Nets with their arguments
NETS = {"vit_tiny_patch16_224": {"depth": 4}, "deit": {}}


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_is_trained_and_images_have_any_size(net):
    model = build("eomt", net, model__args=NETS[net])
    loss = losses(model)
    assert set(loss) == {"decode.loss_cls", "decode.loss_mask", "decode.loss_dice"}
    assert without_gradient(model, loss) == []
    model.eval()
    with torch.no_grad():
        logits = model.logits(torch.randn(1, 3, 61, 75))
    assert logits.shape == (1, CLASSES, 61, 75) and not logits.isnan().any()


def test_half_precision_trains_every_parameter():
    model = build("eomt", "deit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, masks = model.decode_head((model.backbone, torch.randn(2, 3, 64, 96)))
        loss = losses(model)
    assert {output.dtype for output in (*scores, *masks)} == {torch.float32}
    assert without_gradient(model, loss) == []


def test_without_masks_training_predicts_as_evaluation_and_masks_change_the_prediction():
    for net, args in NETS.items():
        model = stir(build("eomt", net, model__args={"drop_path_rate": 0.0, **args}))
        image = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            results: Any = []
            for training, share in ((True, 1.0), (False, 0.0), (True, 0.0)):
                model.train(training).set_progress(share)
                scores, masks = model.decode_head((model.backbone, image))
                assert len(scores) == len(masks) == (4 if training else 1)
                results.append(masks[-1])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(results[1], results[2], rtol=1e-2)


def test_a_masked_query_attends_to_all_queries_and_extra_tokens_and_to_its_mask():
    head = build("eomt", "deit").decode_head
    Q, E, size, stride = head.num_queries, 1, (2, 3), 4
    masks = torch.randn(2, Q, *size).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    tokens = Q + E + size[0] * size[1]
    allowed = head.attention_mask(masks, tokens, size, 1.0)
    assert allowed.shape == (2, 1, tokens, tokens)
    for image, query, key in product(range(2), range(tokens), range(tokens)):
        expected = True
        if query < Q and key >= Q + E:
            row, column = divmod(key - Q - E, size[1])
            expected = masks[image, query, row * stride + 1, column * stride + 1] > 0
        assert allowed[image, 0, query, key] == expected
    assert head.attention_mask(masks, tokens, size, 0.0).all()


def test_masks_are_annealed_in_one_block_after_another():
    model = build("eomt", "deit", head__args={"decode_head": {"num_blocks": 4}}, model__args={"depths": [5]})

    def probabilities(share: float) -> list[float]:
        model.set_progress(share)
        return model.decode_head.mask_probabilities

    assert probabilities(0.0) == probabilities(1 / 6) == [1.0] * 4
    # Halfway through the second block's sixth
    assert probabilities(2.5 / 6) == pytest.approx([0.0, 0.5**0.9, 1.0, 1.0])
    assert probabilities(5 / 6) == pytest.approx([0.0] * 4, abs=1e-9) and probabilities(1.0) == [0.0] * 4


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = build("eomt", "deit")
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        assert without_gradient(model, losses(model)) == []
        grads.append(model.decode_head.query_feat.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("net", "args", "reason"),
    [
        (
            "resnet18",
            {},
            "EoMT needs a plain ViT, such as model=deit or timm's vit_small_patch16_224, not a net with 4",
        ),
        ("deit", {"mixers": "window"}, "EoMT masks the attention of the last 3 blocks, whose op must be full"),
        ("deit", {"depths": [3]}, "num_blocks must be from 1 to 2, not 3"),
    ],
)
def test_other_nets_are_refused(net, args, reason):
    with pytest.raises(ValueError, match=reason):
        build("eomt", net, model__args=args)


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="EoMTHead takes no argument 'num_query'"):
        build("eomt", "deit", head__args={"decode_head": {"num_query": 20}})
