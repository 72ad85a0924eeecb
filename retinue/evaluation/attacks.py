"""Adversarial images: FGSM (Goodfellow et al., ICLR 2015, arXiv:1412.6572) and PGD (Madry et al., arXiv:1706.06083).

An attack changes each value of an image by at most epsilon, so that the net's loss becomes large.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Length of a PGD step times the number of steps, relative to epsilon, as in Madry's code for CIFAR-10.
PGD_REACH = 2.5


@dataclass(frozen=True)
class Ball:
    """The images that differ from `image` by at most epsilon in every value, and whose values are from 0 to 1.

    Attributes:
        image: (B, C, H, W), normalised.
        epsilon: largest difference of a value from 0 to 1.
        mean: (C, 1, 1), the mean of the normalisation.
        std: (C, 1, 1), the deviation of the normalisation.
    """

    image: Tensor
    epsilon: float
    mean: Tensor
    std: Tensor

    @property
    def radius(self) -> Tensor:
        """Epsilon in normalised values, (C, 1, 1)."""
        return self.epsilon / self.std

    def nearest(self, image: Tensor) -> Tensor:
        """Return the image of the ball that is nearest to a normalised image."""
        image = torch.maximum(torch.minimum(image, self.image + self.radius), self.image - self.radius)
        return torch.maximum(torch.minimum(image, (1 - self.mean) / self.std), -self.mean / self.std)


def fgsm(net: Callable[[Tensor], Tensor], label: Tensor, ball: Ball) -> Tensor:
    """Return the image of the ball in the direction of the gradient's sign, (B, C, H, W).

    Args:
        net: function from images to logits (B, K).
        label: (B,).
        ball: the images that the attack may return.
    """
    _, gradient = _ascent(net, ball.image, label)
    return ball.nearest(ball.image + ball.radius * gradient.sign())


def pgd(net: Callable[[Tensor], Tensor], label: Tensor, ball: Ball, start: Tensor, steps: int) -> Tensor:
    """Return the image with the largest loss on a projected ascent within the ball, (B, C, H, W).

    Args:
        net: function from images to logits (B, K).
        label: (B,).
        ball: the images that the attack may return.
        start: (B, C, H, W), from -1 to 1: place in the ball where the ascent begins.
        steps: number of steps.
    """
    image = ball.nearest(ball.image + ball.radius * start)
    best, largest = image, torch.full_like(image[:, 0, 0, 0], -torch.inf)
    for step in range(steps + 1):
        losses, gradient = _ascent(net, image, label)
        is_better = losses > largest
        best, largest = torch.where(is_better[:, None, None, None], image, best), torch.maximum(losses, largest)
        if step < steps:
            image = ball.nearest(image + ball.radius * (PGD_REACH / steps) * gradient.sign())
    return best


def _ascent(net: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (B,), and the gradient of their sum for the images."""
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        losses = cross_entropy(net(image).float(), label, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), image)[0]
