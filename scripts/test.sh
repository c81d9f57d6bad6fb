#!/usr/bin/env bash
# Sets up .venv with the test dependencies and runs the tests.
#
#   ./scripts/test.sh                 the default suite: everything but "slow", "parity", "browser"
#   ./scripts/test.sh --all           every marker, and code compiled as users' is (the default
#                                     suite compiles with few optimisations, which is quicker)
#   ./scripts/test.sh ARGS...         further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

if [ "${1:-}" = "--all" ]; then
  shift
  prepare_environment dev tensorboard parity
  export JAX_DISABLE_MOST_OPTIMIZATIONS=0
  set -- -m "" "$@"
else
  prepare_environment dev tensorboard
  set -- -m "not slow and not parity and not browser" "$@"
fi
ruff check .
ruff format --check .
exec python -m pytest --numprocesses="${TEST_PROCESSES:-2}" "$@"
