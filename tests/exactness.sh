#!/usr/bin/env bash
# Makes docs/exactness.md: every layout against one process. `--json FILE` writes the rows too; `--help` tells the rest.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
exec python -m tests.exactness.table "$@"
