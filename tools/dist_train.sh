#!/usr/bin/env bash
# Trains with several processes, on one machine or on each of NNODES machines.
#
# Usage: [MAX_RESTARTS=3] tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Several machines: NNODES=2 MASTER_ADDR=10.0.0.1 [MASTER_PORT=29500] [NODE_RANK=0] on each of them.
# Where there is no GPU, GPUS is the number of processes on the CPU.
#
# When a process or a machine dies, torchrun starts all processes again, MAX_RESTARTS times at most,
# and training goes on from the newest checkpoint (docs/survival.md).
set -euo pipefail
usage='usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]'
config=${1:?$usage} gpus=${2:?$usage}
shift 2
tools=$(cd "$(dirname "$0")" && pwd)

restarts=${MAX_RESTARTS:-0}
nodes=(--standalone) # picks a free port, so that two runs on one machine do not collide
if [ "${NNODES:-1}" -gt 1 ]; then
    master=${MASTER_ADDR:?} port=${MASTER_PORT:-29500}
    nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "$(basename "$config" .py)")
    if [ "$restarts" -eq 0 ] && [ -n "${NODE_RANK:-}" ]; then # a rendezvous that nobody can rejoin
        nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$master" --master-port "$port")
    fi
fi
if [ "$restarts" -gt 0 ]; then
    # Checkpoints from now on are this run's; a second later, since those of one before can be new.
    export MMSLAK_STARTED=$(($(date +%s) + 1))
    # Or processes find, in torchrun's store, the addresses of those that died.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    "${nodes[@]}" --max-restarts "$restarts" --nproc-per-node "$gpus" \
    "$tools/train.py" "$config" --launcher pytorch "$@"
