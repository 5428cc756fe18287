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
# Unit tests fill what the others leave of the cores: those start ranks, and wait for them. Their output comes last.
status=0
unit="$(mktemp)"
nice python -m pytest -q -n 2 --dist loadfile tests/unit "$@" >"$unit" 2>&1 &
running=$!
# Where nothing is left to kill, `set -e` would make kill's failure the status of the whole, in a trap too.
trap 'kill "$running" 2>/dev/null || true; rm -f -- "$unit"' EXIT
python -m pytest -q tests --ignore tests/unit "$@" || status=$?
wait "$running" || status=$?
cat -- "$unit"
exit "$status"
