"""Positional embeddings at another resolution."""

from __future__ import annotations

import math

import numpy as np

from mlclip_jax.errors import UserError

# The cubic kernel's free parameter; -0.75 is what PyTorch (and so every CLIP descendant) uses.
_CUBIC_A = -0.75


def interpolate_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resize the square grid of a positional table, keeping the class (or mean) token's row.

    Bicubic with a = -0.75, half-pixel centres, border samples repeated, no antialiasing: the
    function of `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, which
    Hugging Face's `interpolate_pos_encoding` uses.

    Args:
        table: `[1+n w]`, n a square number, rows of the grid in row-major order.
        grid: rows and columns of the new grid, m = rows * columns.

    Returns:
        float32 `[1+m w]`; the input itself (as float32) where the grid is already right.

    Raises:
        UserError: n is not a square number, or the new grid is empty.
    """
    table = np.asarray(table, np.float32)
    side = math.isqrt(max(table.shape[0] - 1, 0))
    if side * side != table.shape[0] - 1 or side == 0:
        raise UserError(
            f"cannot resize a positional embedding of {table.shape[0] - 1} places: "
            "only square grids can be interpolated"
        )
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise UserError(f"cannot resize a positional embedding to a grid of {rows} x {columns}")
    if (rows, columns) == (side, side):
        return table
    places = table[1:].reshape(side, side, -1)
    resized = np.einsum(
        "yh,xv,hvw->yxw",
        _cubic_weights(side, rows),
        _cubic_weights(side, columns),
        places,
        optimize=True,
    )
    return np.concatenate([table[:1], resized.reshape(rows * columns, -1)]).astype(np.float32)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Interpolation along one axis as a float32 matrix `[new old]`."""
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.clip(first + tap, 0, old - 1)
        # Several taps fall on the same border sample, hence the unbuffered addition.
        np.add.at(weights, (np.arange(new), source), _cubic(centres - (first + tap)))
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at signed distances below 2."""
    a, x = _CUBIC_A, np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
