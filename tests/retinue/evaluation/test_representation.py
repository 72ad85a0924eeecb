"""Quality of features against loops and cases with a known answer."""

import numpy as np
import pytest

from retinue.evaluation.representation import rankme


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_singular_values_is_their_number(rank):
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 8)))[0][:, :rank]
    assert rankme(rows @ np.eye(rank, 8)) == pytest.approx(rank, rel=1e-4)
