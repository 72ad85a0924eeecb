"""Rows of a trained classifier for the classes of other data, as in fine-tuning from ImageNet-22k to ImageNet-1k.

Source: Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030), whose fine-tuning on ImageNet-1k starts from 1,000
rows of the classifier for ImageNet-22k (microsoft/Swin-Transformer, utils.py).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassifierRows:
    """A row of a checkpoint's classifier for each class of a net.

    Attributes:
        rows: Row of the checkpoint's classifier by class of the net; -1 keeps the net's own row.
        count: Number of rows that the checkpoint's classifier must have; None: any number.
        source: What the rows were read from, for errors.
    """

    rows: Sequence[int]
    count: int | None
    source: str

    def pick(
        self, state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], classifier: Collection[str]
    ) -> dict[str, Tensor]:
        """Return a checkpoint's weights with the chosen rows in place of the classifier's.

        Parameters of the classifier that do not have a row for each class, such as a hidden layer's, stay as they are.

        Args:
            state: Weights of the checkpoint under the model's names.
            model_state: Weights of the model.
            classifier: Names of the classifier's parameters.

        Raises:
            ValueError: The checkpoint has no classifier, or its classifier has another number of rows than `count`, or
                fewer rows than `rows` names.
        """
        picked = dict(state)
        names = [name for name in classifier if name in state and model_state[name].shape[:1] == (len(self.rows),)]
        if not names:
            raise ValueError(f"classifier_map={self.source}: the weights have no classifier to take rows from")
        rows = torch.tensor(self.rows)
        for name in names:
            count = len(state[name])
            if self.count not in (None, count):
                raise ValueError(
                    f"classifier_map={self.source} is for a classifier of {self.count} classes, and the one in the "
                    f"weights has {count}"
                )
            if max(self.rows) >= count:
                label = list(self.rows).index(max(self.rows))
                raise ValueError(
                    f"classifier_map={self.source} gives class {label} the row {max(self.rows)}, and the classifier in "
                    f"the weights has the rows 0 to {count - 1}"
                )
            # A row of -1 is read from the end first and then replaced.
            own = (rows < 0).view(-1, *[1] * (state[name].ndim - 1))
            picked[name] = torch.where(own, model_state[name], state[name][rows].to(model_state[name]))
        return picked
