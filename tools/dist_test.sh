#!/usr/bin/env bash
# Tests with several processes, on one machine or on each of NNODES machines.
#
# Usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Several machines: NNODES=2 MASTER_ADDR=10.0.0.1 [MASTER_PORT=29500] [NODE_RANK=0] on each of them.
# Where there is no GPU, GPUS is the number of processes on the CPU.
set -euo pipefail
usage='usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]'
config=${1:?$usage} checkpoint=${2:?$usage} gpus=${3:?$usage}
shift 3
tools=$(cd "$(dirname "$0")" && pwd)

nodes=(--standalone) # picks a free port, so that two runs on one machine do not collide
if [ "${NNODES:-1}" -gt 1 ]; then
    master=${MASTER_ADDR:?} port=${MASTER_PORT:-29500}
    nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "$(basename "$config" .py)")
    if [ -n "${NODE_RANK:-}" ]; then
        nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$master" --master-port "$port")
    fi
fi
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    "${nodes[@]}" --nproc-per-node "$gpus" "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
