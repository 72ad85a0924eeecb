"""Tests of the fit of time and memory to the number of tokens."""

import pytest

from retinue.benchmarks.growth import exponents


def test_cost_is_fitted_from_512_pixels_on():
    def row(side, ms, peak_mb):
        return {
            "series": "s",
            "what": "w",
            "direction": "d",
            "batch": 1,
            "pixels": side**2,
            "median_ms": ms,
            "peak_mb": peak_mb,
        }

    rows = [row(224, 50.0, 50.0), *(row(n, 1e-3 * n**2.0, 1e-6 * n**4.0) for n in (512, 1024, 2048))]
    [fitted] = exponents(rows)
    assert fitted["time"] == pytest.approx(1.0) and fitted["memory"] == pytest.approx(2.0)
    [fitted] = exponents([{**r, "peak_mb": None} for r in rows])
    assert fitted["memory"] is None
    assert not exponents(rows[:2])
