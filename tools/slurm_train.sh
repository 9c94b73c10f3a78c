#!/usr/bin/env bash
# Trains under Slurm, one task per GPU.
#
# Usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS='…'] \
#     tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
set -euo pipefail
usage='usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]'
partition=${1:?$usage} job=${2:?$usage} config=${3:?$usage}
shift 3
tools=$(cd "$(dirname "$0")" && pwd)

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -r -a extra <<<"${SRUN_ARGS:-}"
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec srun \
    --partition "$partition" --job-name "$job" \
    --ntasks "$gpus" --ntasks-per-node "$per_node" --gres "gpu:$per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${extra[@]+"${extra[@]}"} \
    "${PYTHON:-python}" -u "$tools/train.py" "$config" --launcher slurm "$@"
