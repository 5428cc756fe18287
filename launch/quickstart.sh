#!/usr/bin/env bash
# The whole job on this machine: real text -> parent -> family -> standalone submodels -> report.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [--out DIR] [--ranks N]

Installs the pinned packages once, then trains a small parent on real text, turns it into a nested family of three budgets,
cuts the standalone models out, evaluates them and writes DIR/report.md and DIR/report.json. Run again, it goes on from where
it was interrupted.

  --out DIR    where everything is written (default: quickstart)
  --ranks N    processes to run, 1 or more (default: left to the machine; 2 without a GPU)
  --help       this text
TEXT
}

fail() {
  printf 'quickstart.sh: %s\n' "$1" >&2
  usage >&2
  exit 2
}

out="quickstart"
ranks=""
while (($#)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --out=* | --ranks=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --out)
      [[ -n ${2:-} ]] || fail "--out needs a folder"
      out="$2"
      shift 2
      ;;
    --ranks)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--ranks is '${2:-}': it must be a whole number, 1 or more"
      ranks="$2"
      shift 2
      ;;
    *) fail "unknown argument '$1'" ;;
  esac
done

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec python -m megatron_elastic quickstart --out "$out" ${ranks:+--ranks "$ranks"}
