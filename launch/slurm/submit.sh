#!/usr/bin/env bash
# Submits a training as a chain of jobs, and afterwards the extraction and evaluation of its budgets.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/slurm/submit.sh [options] [SBATCH_OPTION ...] -- COMMAND RECIPE

Submits launch/slurm/train.sbatch for `COMMAND RECIPE` (train or pretrain) and prints the jobs' numbers.

  --jobs N            a chain of N jobs: each begins when the one before has ended well, which is done, or stopped at its time
                      limit with a checkpoint; a fault ends the chain. For clusters that do not let a job queue itself again,
                      which a single job does (default: 1)
  --family DIR        with the next three: afterwards a job array, one task a budget, extracts and evaluates
  --budgets A,B,C     the budgets' names
  --data PREFIX       token data of the evaluation
  --out DIR           where the checkpoints go (default: budgets)
  --dry-run           print sbatch's commands and submit nothing; a number that sbatch would tell stands as JOB1, JOB2, ...
  --help              this text

SBATCH_OPTIONs (--nodes=8 --time=4:00:00 --partition=P ...; written with `=`) go to the training's jobs. A curriculum's stages
need no jobs of their own: they share nodes and layout, and one job makes all of them.
TEXT
}

jobs=1 family="" budgets="" data="" out=budgets dry_run=0
options=() words=() faults=()
while (($#)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    --jobs=* | --family=* | --budgets=* | --data=* | --out=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --jobs | --family | --budgets | --data | --out)
      if [[ -z ${2:-} || $2 == -* ]]; then
        faults+=("$1 needs a value")
      else
        printf -v "${1#--}" '%s' "$2"
        shift
      fi
      ;;
    --)
      words=("${@:2}")
      break
      ;;
    -*) options+=("$1") ;;
    *) faults+=("'$1' stands before --: write an option of sbatch with its value as --name=value") ;;
  esac
  shift
done
[[ $jobs =~ ^[1-9][0-9]{0,2}$ ]] || faults+=("--jobs is '$jobs': it must be a whole number, 1 to 999")
case "${words[0]:-}" in
  train | pretrain) ((${#words[@]} == 2)) || faults+=("COMMAND and RECIPE are what stands after --; found: ${words[*]}") ;;
  *) faults+=("COMMAND after -- is '${words[0]:-}': it must be train or pretrain") ;;
esac
if [[ -n $family$budgets$data && ( -z $family || -z $budgets || -z $data ) ]]; then
  faults+=("--family, --budgets and --data belong together: give all three or none")
fi
if ((${#faults[@]})); then
  {
    printf 'submit.sh: %d fault(s)\n' "${#faults[@]}"
    printf '  - %s\n' "${faults[@]}"
    printf 'What can be given: bash launch/slurm/submit.sh --help\n'
  } >&2
  exit 2
fi

here="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
submitted=0 job=""

# Submits one job, after the last one has ended well; sets `job` to its number.
submit() {
  local command=(sbatch --parsable)
  # A job whose turn can never come leaves the queue.
  [[ -z $job ]] || command+=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  command+=("$@")
  submitted=$((submitted + 1))
  if ((dry_run)); then
    local line
    printf -v line '%q ' "${command[@]}"
    printf '%s\n' "${line% }"
    job="JOB$submitted"
  else
    job="$("${command[@]}")"
    job="${job%%;*}" # NUMBER;CLUSTER on a federation
    printf '%s\n' "$job"
  fi
}

chained=()
((jobs == 1)) || chained=("--export=ALL,CHAINED=1")
for ((turn = 0; turn < jobs; turn++)); do
  submit "${options[@]}" "${chained[@]}" "$here/train.sbatch" "${words[@]}"
done
if [[ -n $family ]]; then
  IFS=, read -ra names <<<"$budgets"
  submit "--array=0-$((${#names[@]} - 1))" "$here/budgets.sbatch" "$family" "$data" "$out" "${names[@]}"
fi
