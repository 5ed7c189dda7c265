"""Corruptions of inputs: shape and type stay, severity counts, the same seed gives the same."""

import numpy as np
import pytest

from penjing.arrays.corruptions import KINDS, SEVERITIES, corrupt, fitting
from penjing.core.errors import Refused

RNG = np.random.default_rng(0)
IMAGES = np.cumsum(np.cumsum(RNG.standard_normal((20, 3, 16, 16)), -1), -2).astype(np.float32)
"""Smooth, as photographs are."""

TABLE = RNG.standard_normal((200, 5)).astype(np.float64)
TOKENS = RNG.integers(1, 100, (50, 12))


def test_what_fits_which_inputs():
    assert fitting(IMAGES) == ("noise", "blur", "contrast", "brightness", "pixelate")
    assert fitting(TABLE) == ("noise", "missing")
    assert fitting(TOKENS) == ("missing",)
    assert {*fitting(IMAGES), *fitting(TABLE)} == set(KINDS)


@pytest.mark.parametrize("x", [IMAGES, TABLE, TOKENS], ids=["images", "table", "tokens"])
def test_severity_moves_inputs_further_and_nothing_else_changes(x):
    before = x.copy()
    for name in fitting(x):
        moved = []
        for severity in SEVERITIES:
            got = corrupt(x, name, severity, seed=3)
            assert got.shape == x.shape
            assert got.dtype == x.dtype
            assert np.array_equal(got, corrupt(x, name, severity, seed=3))
            moved.append(np.abs(got.astype(float) - x).mean())
        assert moved == sorted(moved), name
        assert moved[0] > 0, name
    assert np.array_equal(x, before)


def test_what_each_does():
    assert corrupt(IMAGES, "noise", 5).std() > corrupt(IMAGES, "noise", 1).std() > IMAGES.std()
    flat = corrupt(IMAGES, "contrast", 5)
    np.testing.assert_allclose(flat.mean((1, 2, 3)), IMAGES.mean((1, 2, 3)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(flat.std((1, 2, 3)), 0.15 * IMAGES.std((1, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(corrupt(IMAGES, "brightness", 2) - IMAGES, 0.4 * IMAGES.std(), rtol=1e-2)
    coarse = corrupt(IMAGES, "pixelate", 5)
    assert len(np.unique(coarse[0, 0])) <= 36
    assert corrupt(IMAGES, "blur", 3)[..., 4:-4, 4:-4].std() < IMAGES[..., 4:-4, 4:-4].std()
    gone = corrupt(TOKENS, "missing", 4) == 0
    assert 0.1 < gone.mean() < 0.3
    assert (corrupt(TABLE, "missing", 5) == np.median(TABLE, axis=0)).mean() == pytest.approx(0.4, abs=0.07)


def test_what_does_not_fit_is_refused():
    with pytest.raises(Refused, match="must fit inputs"):
        corrupt(TABLE, "blur", 1)
    with pytest.raises(Refused, match="must fit inputs"):
        corrupt(IMAGES, "fog", 1)
    with pytest.raises(Refused, match="1 to 5"):
        corrupt(IMAGES, "blur", 6)
