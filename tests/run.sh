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
targets=(tests)
for argument in "$@"; do
  # Files named by the user are run instead of everything.
  [[ -e ${argument%%::*} ]] && targets=()
done
exec python -m pytest -q "${targets[@]}" "$@"
