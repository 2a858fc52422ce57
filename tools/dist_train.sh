#!/usr/bin/env bash
# Trains on several GPUs of one machine, or of several with NNODES, NODE_RANK and MASTER_ADDR;
# without a GPU in as many processes on the CPU.
set -euo pipefail
usage='usage: tools/dist_train.sh CONFIG GPUS [FLAGS OF train.py]'
config=${1:?$usage}
gpus=${2:?$usage}
tools=$(dirname "$0")

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" \
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$tools/train.py" "$config" --launcher pytorch "${@:3}"
