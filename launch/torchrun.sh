#!/usr/bin/env bash
# One node's part of a training run: torchrun, once a stage, until every stage is made. The same on every node.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/torchrun.sh [options] COMMAND RECIPE
       bash launch/torchrun.sh [options] rank RECIPE --checkpoint DIR --out FILE ...

Runs `megatron-elastic COMMAND RECIPE` (train, pretrain or rank) under torchrun on one node or several. Give the same command on
every node, from the same folder of a file system that the nodes share; only --node-rank differs. Under SLURM start one task
a node, and everything is known from SLURM's variables:

  srun --ntasks-per-node=1 bash launch/torchrun.sh train recipe.yaml

  --nnodes N           nodes of the run        (SLURM_STEP_NUM_NODES or SLURM_NNODES; otherwise 1)
  --node-rank R        this node, from 0       (SLURM_NODEID; otherwise 0)
  --nproc-per-node G   ranks on this node      (SLURM_GPUS_ON_NODE; otherwise the GPUs, or 1 where there is none)
  --master-addr A      address of node 0       (first of SLURM_STEP_NODELIST or SLURM_JOB_NODELIST; must be given for more
                                                than one node without SLURM)
  --master-port P      port on node 0          (from SLURM_JOB_ID; otherwise 29500); stage K of a run takes P + K - 1
  --wait SECONDS       how long the nodes wait for each other at the start of a stage (default 600)
  --dry-run            print torchrun's command for the first stage and end
  --help               this text

Every stage is a start of its own, and goes on from the newest checkpoint. When a rank or a node is lost, the others end with
a message and status 1 after Megatron's timeout: `distributed-timeout-minutes` of the recipe's section `megatron` (10), or
`distributed-timeout-seconds-after-init` after the first step (not for the pipeline's sends over gloo). torchrun restarts
nothing by itself: give the command again on every node. Output: logs/ beside the checkpoint folder, one file a node; of rank,
whose own options come after RECIPE, on the console.

With several network interfaces say which one connects the nodes: NCCL_SOCKET_IFNAME (GPUs), GLOO_SOCKET_IFNAME (CPU ranks,
and the checkpoints of GPU ranks).

SIGTERM or Ctrl-C stop it after the step it is in, with a checkpoint; the ranks get TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds for
that (30). Exit status: 0 done; 1 it could not be done, or it was stopped and nothing new could be saved; 2 bad usage or a bad
recipe; 130 stopped, and the same command goes on from a newer checkpoint. launch/slurm/ has SLURM's job scripts.
TEXT
}

nodes="${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}"
node="${SLURM_NODEID:-0}"
ranks="${SLURM_GPUS_ON_NODE:-}"
[[ $ranks == 0 ]] && ranks=""
node_list="${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}"
master=""
port=29500
# Jobs that share a node take different ports, below those that the kernel gives to clients.
[[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]] && port=$((15000 + 10#$SLURM_JOB_ID % 10000))
wait=600
dry_run=0
words=()
faults=()

while (($#)); do
  case "$1" in
    --help | -h)
      usage
      exit 0
      ;;
    --dry-run) dry_run=1 ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --nnodes | --node-rank | --nproc-per-node | --master-addr | --master-port | --wait)
      if (($# < 2)) || [[ -z $2 || $2 == --* ]]; then
        faults+=("$1 needs a value")
        shift
        continue
      fi
      case "$1" in
        --nnodes) nodes="$2" ;;
        --node-rank) node="$2" ;;
        --nproc-per-node) ranks="$2" ;;
        --master-addr) master="$2" ;;
        --master-port) port="$2" ;;
        --wait) wait="$2" ;;
      esac
      shift
      ;;
    -*) faults+=("unknown option '$1'") ;;
    rank)
      words+=("$@") # its own options come after it
      break
      ;;
    *) words+=("$1") ;;
  esac
  shift
done

number() {
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
    faults+=("$1 is '$2': it must be a whole number, $3 to $4")
  fi
}

number --nnodes "$nodes" 1 100000
if [[ $nodes =~ ^[1-9][0-9]{0,8}$ ]]; then
  number --node-rank "$node" 0 "$((nodes - 1))"
else
  number --node-rank "$node" 0 99999
fi
[[ -z $ranks ]] || number --nproc-per-node "$ranks" 1 1024
number --master-port "$port" 1 65535
number --wait "$wait" 1 86400
if [[ ! ${SLURM_STEP_TASKS_PER_NODE:-1} =~ ^1(\(x[0-9]+\))?$ || ${SLURM_LOCALID:-0} != 0 ]]; then
  faults+=("SLURM starts several tasks on a node: torchrun starts a node's ranks itself, so give srun --ntasks-per-node=1")
fi
if [[ -z $master && $nodes =~ ^[1-9][0-9]*$ ]]; then
  if ((nodes == 1)); then
    master=127.0.0.1
  elif [[ -z $node_list ]]; then
    faults+=("--master-addr is missing: with more than one node it is the address of node 0, the same on every node")
  elif ! hosts="$(scontrol show hostnames "$node_list" 2>/dev/null)" || [[ -z $hosts ]]; then
    faults+=("--master-addr is missing, and \`scontrol show hostnames $node_list\` does not tell the first node: give it")
  else
    master="${hosts%%$'\n'*}"
  fi
fi
case "${words[0]:-}" in
  train | pretrain | rank) ;;
  "") faults+=("COMMAND is missing: train, pretrain or rank") ;;
  *) faults+=("COMMAND is '${words[0]}': it must be train, pretrain or rank") ;;
esac
if ((${#words[@]} < 2)) || [[ ${words[0]} != rank && ${#words[@]} != 2 ]]; then
  faults+=("COMMAND and RECIPE are what is given after the options; found: ${words[*]:-nothing}")
elif [[ ! -f ${words[1]} ]]; then
  faults+=("RECIPE is '${words[1]}': there is no such file here ($PWD)")
fi
if ((${#faults[@]})); then
  {
    printf 'torchrun.sh: %d fault(s)\n' "${#faults[@]}"
    printf '  - %s\n' "${faults[@]}"
    printf 'What can be given: bash launch/torchrun.sh --help\n'
  } >&2
  exit 2
fi

# A Python that has the package installed (a container) is used as it is; -I: this clone on PYTHONPATH does not count.
# A dry run that needs no Python installs none.
if ! { ((dry_run)) && [[ -n $ranks ]]; } \
  && ! python -I -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("megatron_elastic"))' 2>/dev/null; then
  # shellcheck source=launch/environment.sh
  source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
fi
if [[ -z $ranks ]]; then
  ranks="$(python -c 'import torch; print(torch.cuda.device_count() or 1)')"
fi

# One hardware queue, so that kernels start in the order in which they were issued: Megatron demands it for tensor and
# context parallelism on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Ranks share the cores; without it each takes a thread a core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

launcher=(
  python -m torch.distributed.run
  --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$ranks" --master-addr "$master"
  # One node's ranks cannot join a run that is under way: a lost run is started again on every node.
  --max-restarts 0
  --rdzv-conf "timeout=$wait"
)
if ((dry_run)); then
  printf -v line '%q ' "${launcher[@]}" --master-port "$port" -m megatron_elastic "${words[@]}"
  printf '%s\n' "${line% }"
  exit 0
fi
if [[ ${words[0]} == rank ]]; then
  exec "${launcher[@]}" --master-port "$port" -m megatron_elastic "${words[@]}"
fi
exec python -m megatron_elastic _node --nodes "$nodes" --node-rank "$node" --ranks "$((nodes * ranks))" \
  --master-port "$port" "${words[@]}" -- "${launcher[@]}"
