"""Interpolation of positional embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from mlclip_jax.clip.positions import interpolate_positions
from mlclip_jax.errors import UserError


def test_recorded_values():
    # torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of [[0, 1], [2, 5]].
    table = np.array([[9.0], [0.0], [1.0], [2.0], [5.0]])
    expected = [
        [-0.2453463, 0.2395833, 0.7245131],
        [0.8263890, 2.0, 3.1736112],
        [1.8981241, 3.7604165, 5.6227102],
    ]
    result = interpolate_positions(table, (3, 3))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0], 9.0)
    np.testing.assert_allclose(result[1:, 0], np.ravel(expected), atol=1e-6)


def test_same_grid_is_untouched():
    table = np.random.default_rng(0).normal(size=(17, 5)).astype(np.float32)
    np.testing.assert_array_equal(interpolate_positions(table, (4, 4)), table)


def test_constants_stay_constant_in_any_grid():
    table = np.full((10, 2), 0.7, np.float32)
    result = interpolate_positions(table, (5, 8))
    assert result.shape == (41, 2)
    np.testing.assert_allclose(result, 0.7, rtol=1e-6)


def test_only_square_grids():
    with pytest.raises(UserError, match="12 places"):
        interpolate_positions(np.zeros((13, 2)), (4, 4))
    with pytest.raises(UserError, match="0 x 4"):
        interpolate_positions(np.zeros((10, 2)), (0, 4))


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(24, 24), (3, 3), (9, 14), (1, 2), (6, 7)])
def test_equals_torch(grid):
    import torch

    table = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    places = torch.from_numpy(table[1:].reshape(1, 7, 7, 6)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        places, size=grid, mode="bicubic", align_corners=False
    )
    expected = resized.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    result = interpolate_positions(table, grid)
    np.testing.assert_array_equal(result[0], table[0])
    assert np.abs(result[1:] - expected).max() <= 2e-6 * np.abs(expected).max()
