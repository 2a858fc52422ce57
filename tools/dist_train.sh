#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [FLAGS OF train.py]
set -euo pipefail
config=$1
gpus=$2
tools=$(dirname "$0")

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" \
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$tools/train.py" "$config" --launcher pytorch "${@:3}"
