"""The scripts as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def script():
    """scripts/convert_released.py as a module."""
    path = Path(__file__).parents[2] / "scripts" / "convert_released.py"
    spec = importlib.util.spec_from_file_location("convert_released", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module
