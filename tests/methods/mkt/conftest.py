"""The golden of MKT in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))
import exact


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden():
    with np.load(exact.GOLDEN / "mkt.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def clip():
    with jax.enable_x64(True):
        return exact.load("clip_vit")[0]


@pytest.fixture(scope="session")
def images(golden):
    with jax.enable_x64(True):
        return jnp.asarray(golden["in/images"].transpose(0, 2, 3, 1), jnp.float64)
