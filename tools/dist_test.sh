#!/usr/bin/env bash
# tools/dist_test.sh CONFIG CHECKPOINT GPUS [FLAGS OF test.py]
set -euo pipefail
config=$1
checkpoint=$2
gpus=$3
tools=$(dirname "$0")

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" \
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
