#!/usr/bin/env bash
# Kills a small two-rank run with SIGKILL at twenty seeded moments (inside steps, saves, asynchronous saves and stage
# changes), resumes it each time and compares it, bit for bit, with a run that was never stopped. Prints a table; about
# five minutes on two cores. Arguments: --seed N draws other moments, --keep DIR leaves the runs.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
exec python -m tests.end_to_end.kills "$@"
