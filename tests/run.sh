#!/usr/bin/env bash
# Sets up as the quickstart does, then linters, types and tests. Arguments go to pytest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
# Small tensors: more threads a process only take the cores from the other ranks.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_DEVICE_MAX_CONNECTIONS=1
ruff check .
mypy
for argument in "$@"; do
  # Files named by the user are run instead of everything.
  [[ -e ${argument%%::*} ]] && exec python -m pytest -q "$@"
done
# Unit tests take one core each; everything else starts ranks of its own, which take both.
status=0
python -m pytest -q -n 2 --dist loadfile tests/unit "$@" || status=$?
python -m pytest -q tests --ignore tests/unit "$@" || status=$?
exit "$status"
