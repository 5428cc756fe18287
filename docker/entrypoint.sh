#!/usr/bin/env bash
# What a container of docker/Dockerfile runs: a subcommand of megatron-elastic, launch/torchrun.sh, or any other program.
#
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" megatron-elastic train recipe.yaml
#   docker run --rm --gpus all --ipc=host --network=host -v "$PWD:/workspace" megatron-elastic \
#     torchrun.sh --nnodes 2 --node-rank 0 --master-addr NODE0 train recipe.yaml
#   docker run --rm -it --gpus all megatron-elastic bash
set -euo pipefail

case "${1:---help}" in
  # The names come first: `sort` and `import` are programs too.
  plan | corpus | pretrain | import | rank | sort | train | extract | evaluate | export | report | quickstart | doctor | -*)
    exec megatron-elastic "${@:---help}"
    ;;
  torchrun.sh)
    exec bash /opt/megatron-elastic/launch/torchrun.sh "${@:2}"
    ;;
  *)
    if ! type -P -- "$1" >/dev/null; then
      printf "entrypoint.sh: '%s' is neither a command of megatron-elastic (--help lists them) nor a program\n" "$1" >&2
      exit 127
    fi
    exec "$@"
    ;;
esac
