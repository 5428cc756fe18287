# shellcheck shell=bash
# Sourced by the job scripts beside it: what they share. Working folder: where the job was submitted, on a shared file system.

slurm_say() { printf '%s: %s\n' "${SLURM_JOB_NAME:-dry run}" "$*" >&2; }

# One line a setting, with its reason; what the job's environment says already is left as it is.
slurm_environment() {
  # The ranks' time to save after a stop. torchrun's own 30 s are too short for a large family. It fits into the time
  # between the signal of `#SBATCH --signal` and the job's end (600 s), with a rest for torchrun to end in.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
  # NCCL says by itself why a connection failed (which interface, which peer); without it, only that one did.
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  # The log of a job that is killed has its last lines.
  export PYTHONUNBUFFERED=1
  # Set by launch/torchrun.sh, on one node or many: CUDA_DEVICE_MAX_CONNECTIONS, OMP_NUM_THREADS.
  # A cluster's own, so given by its users and never here: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA and other
  # NCCL_IB_*: NCCL finds the adapters by itself, and a wrong name costs more than none.
  # Not needed: TORCH_NCCL_AVOID_RECORD_STREAMS and TORCH_NCCL_ASYNC_ERROR_HANDLING are torch's own behaviour now;
  # NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN are set by Megatron from --attention-backend, which refuses a run
  # where they say another thing; NCCL_ALGO, CUBLAS_WORKSPACE_CONFIG and NVTE_ALLOW_NONDETERMINISTIC_ALGO come with
  # --deterministic-mode.
}

# Sets `step`, the command that runs its arguments once a node: on the nodes themselves, or, with CONTAINER_IMAGE, in the
# image of docker/Dockerfile (pyxis and enroot).
slurm_step() {
  step=(
    srun
    # torchrun starts a node's ranks itself.
    --ntasks-per-node=1
    # One task would be bound to one core, and its ranks with it.
    --cpu-bind=none
    # torchrun and NCCL find each other without MPI; a default PMI plugin may be missing in a container.
    --mpi=none
    # One node's failure must not end the others by SIGTERM, which they take for a stop (130): they end by themselves, with
    # status 1, when they lose contact. These two are clusters' defaults.
    --kill-on-bad-exit=0
    --wait=0
  )
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    step+=(
      --container-image="$CONTAINER_IMAGE"
      # The working folder is the same inside; more folders (data, caches) by CONTAINER_MOUNTS=FROM:TO,...
      --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
      --container-workdir="$PWD"
      # Packages in ~/.local would come before the image's.
      --no-container-mount-home
    )
  fi
}

# Prints the folder with launch/ as the nodes see it, inside the container or outside.
slurm_clone() {
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    printf '/opt/megatron-elastic\n'
  else
    printf '%s\n' "$1"
  fi
}

# Prints a command with every word quoted, as it can be given to a shell.
slurm_show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Runs the step "$@" in the background; SLURM's warning (SIGUSR1 to this shell alone) becomes SIGTERM to its tasks, at which
# the training saves and ends. Returns the step's status, the highest of its tasks'.
# SIGTERM to this shell is left alone: a job that is cancelled ends. One that is preempted gets SIGTERM in its tasks.
slurm_run() {
  local status warned=1
  trap 'warned=1; slurm_stop "$child"' USR1
  "$@" &
  local child=$!
  # A signal ends `wait`, and not what is waited for; bash keeps the status of what has ended.
  while ((warned)); do
    warned=0 status=0
    wait "$child" || status=$?
  done
  trap - USR1
  return "$status"
}

# The first step of a job is number 0, again after a requeue. (srun itself takes SIGTERM for an order to kill.) It may not
# have started yet.
slurm_stop() {
  slurm_say "stopping before the time limit"
  until scancel --signal=TERM "$SLURM_JOB_ID.0" || ! kill -0 "$1" 2>/dev/null; do
    sleep 2
  done
}

# What a status of the training means for the job; called last. Only a run that was stopped, with a newer checkpoint than it
# started from, is queued again: every turn gets further, and a fault ends the job.
slurm_finish() {
  local status="$1" turns="${SLURM_RESTART_COUNT:-0}" most="${MAX_RESTARTS:-20}"
  if ((status != 130)); then
    exit "$status"
  fi
  if [[ -n ${CHAINED:-} ]]; then
    slurm_say "stopped with a checkpoint: the next job of the chain goes on"
    exit 0
  fi
  if ((turns >= most)); then
    slurm_say "stopped with a checkpoint, and queued again $turns times already (MAX_RESTARTS=$most): submit it again to go on"
    exit "$status"
  fi
  slurm_say "stopped with a checkpoint: queued again (turn $((turns + 1)) of at most $most)"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    slurm_say "scontrol requeue $SLURM_JOB_ID failed: submit the job again to go on, or use launch/slurm/submit.sh --jobs N"
  fi
  exit "$status"
}

# Prints what a job does: the settings, the step, and what one of its nodes runs.
slurm_dry_run() {
  local name clone="$1"
  shift
  for name in TORCH_ELASTIC_SHUTDOWN_TIMEOUT NCCL_DEBUG PYTHONUNBUFFERED; do
    slurm_show export "$name=${!name}"
  done
  slurm_show "${step[@]}" "$@"
  if [[ $2 == */torchrun.sh ]]; then
    printf '# on the first node of %s, which runs:\n' "${SLURM_JOB_NUM_NODES:-1}"
    bash "$clone/launch/torchrun.sh" --dry-run --nnodes "${SLURM_JOB_NUM_NODES:-1}" --node-rank 0 \
      --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" "${@:3}"
  fi
}
