#!/usr/bin/env bash
# From nothing to a trained multi-label CLIP: sets up .venv, trains CoOp on Scenes with the CLIP
# that ships in the package, compares it with zero-shot CLIP and writes a report with pictures.
#
#   ./scripts/quickstart.sh [WORKDIR]          (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

prepare_environment
workdir=${1:-runs/quickstart}
python -m mlclip_jax.train --config=configs/quickstart.py --workdir="$workdir"
python -m mlclip_jax.evaluate --workdir="$workdir" --checkpoint=best
