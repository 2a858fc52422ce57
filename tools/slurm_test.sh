#!/usr/bin/env bash
# Tests under Slurm, as slurm_train.sh trains.
set -euo pipefail
usage='usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS= PY_ARGS=] tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [FLAGS OF test.py]'
partition=${1:?$usage}
job_name=${2:?$usage}
config=${3:?$usage}
checkpoint=${4:?$usage}
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
tools=$(dirname "$0")

# SRUN_ARGS and PY_ARGS hold several words.
# shellcheck disable=SC2086
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" \
exec srun -p "$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$tools/test.py" "$config" "$checkpoint" --launcher slurm "${@:5}" ${PY_ARGS:-}
