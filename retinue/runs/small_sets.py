"""Batch size of the small recipes on training sets that are too small for it."""

import logging

from omegaconf import DictConfig

from retinue.runs.config import world_size
from retinue.runs.launch import rank
from retinue.utils.arithmetic import round_up

log = logging.getLogger(__name__)

# Smallest number of steps in an epoch of a small recipe.
MIN_STEPS = 8


def fit_batch(cfg: DictConfig, images: int) -> None:
    """Reduce the batch size of a small recipe, so that an epoch has enough steps and drops few images.

    The batch becomes the largest power of two that is at most an eighth of the training images, but at least 2, since
    batch norm may not be able to normalise a single image. It is rounded up to a multiple of the devices and
    accumulated batches. The learning rates follow, as they do for any batch size.

    Small recipes are those with the key `reduced_from`, which then receives the recipe's batch size: a run's identity
    follows from that one, which is known before the data are read. A batch size that the recipe's learning rate was not
    made for (`optimizer.lr_batch_size`) is the user's own and stays.

    Args:
        cfg: composed config; `recipe.batch_size` and `recipe.reduced_from` may change.
        images: number of training images.
    """
    recipe = cfg.recipe
    if "reduced_from" not in recipe or recipe.reduced_from or recipe.batch_size != recipe.optimizer.lr_batch_size:
        return
    power_of_two = 1 << (max(2, images // MIN_STEPS).bit_length() - 1)
    batch_size = round_up(power_of_two, world_size(cfg) * cfg.trainer.accumulate_grad_batches)
    if batch_size >= recipe.batch_size:
        return
    recipe.reduced_from, recipe.batch_size = recipe.batch_size, batch_size
    if rank() == 0:
        log.warning(
            "recipe.batch_size is %d instead of %d, because there are only %d training images; the learning rate is "
            "scaled accordingly", batch_size, recipe.reduced_from, images,
        )  # fmt: skip
