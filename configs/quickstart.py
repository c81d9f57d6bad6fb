"""The first run: CoOp on Scenes with the CLIP in the package, minutes on a CPU, no downloads.

    ./scripts/quickstart.sh

which is

    python -m mlclip_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m mlclip_jax.evaluate --workdir=runs/quickstart --checkpoint=best

The second command compares with zero-shot CLIP and writes the report with its pictures.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of `configs/coop/scenes.py`, whose arguments it takes."""
    return runpy.run_path(str(Path(__file__).parent / "coop" / "scenes.py"))["get_config"](arg)
