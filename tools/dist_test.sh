#!/usr/bin/env bash
# Tests on several GPUs, as dist_train.sh trains.
set -euo pipefail
usage='usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [FLAGS OF test.py]'
config=${1:?$usage}
checkpoint=${2:?$usage}
gpus=${3:?$usage}
tools=$(dirname "$0")

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" \
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
