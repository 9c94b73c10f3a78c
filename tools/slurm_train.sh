#!/usr/bin/env bash
# Trains under Slurm, one task per GPU. Shortly before its time is over, or when it is pre-empted,
# the job saves a checkpoint, goes back to the queue and resumes from there. Slurm sends it back when
# a node fails, too. When a task dies, the job starts all of them again, MAX_RESTARTS times at most.
#
# Usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [MAX_RESTARTS=3] [SBATCH_ARGS='…'] \
#     [SRUN_ARGS='…'] tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
#
# Outside of a job it submits itself; inside of one (of any sbatch) it trains.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
usage='usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]'
partition=${1:?$usage} job=${2:?$usage} config=${3:?$usage}

# Slurm runs a copy of this file from a folder of its own.
export MMSLAK_TOOLS=${MMSLAK_TOOLS:-$(cd "$(dirname "$0")" && pwd)}
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
size=(--ntasks "$gpus" --ntasks-per-node "$per_node" --gres "gpu:$per_node"
    --cpus-per-task "${CPUS_PER_TASK:-5}")

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    read -r -a extra <<<"${SBATCH_ARGS:-}"
    exec sbatch --partition "$partition" --job-name "$job" "${size[@]}" \
        ${extra[@]+"${extra[@]}"} "$MMSLAK_TOOLS/slurm_train.sh" "$@"
fi

shift 3
[[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]] || set -- "$@" --resume
read -r -a extra <<<"${SRUN_ARGS:-}"
restarts=${MAX_RESTARTS:-0} stopped=0
# Checkpoints from now on are this run's; a second later, since those of one before can be new.
[[ $restarts -eq 0 ]] || export MMSLAK_STARTED=$(($(date +%s) + 1))
while :; do
    PYTHONPATH="$MMSLAK_TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" srun "${size[@]}" --kill-on-bad-exit=1 \
        ${extra[@]+"${extra[@]}"} \
        "${PYTHON:-python}" -u "$MMSLAK_TOOLS/train.py" "$config" --launcher slurm "$@" &
    step=$!
    trap 'stopped=1; kill -TERM "$step"' TERM # srun hands it on to the tasks
    status=0
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # the trap has ended the wait
        status=0
        wait "$step" || status=$?
    done
    # 2: a line has said what is wrong, which is so the next time, too.
    if [[ $stopped -eq 1 || $status -eq 0 || $status -eq 2 || $restarts -eq 0 ]]; then break; fi
    echo "srun ended with status $status; starting again, $restarts time(s) at most" >&2
    restarts=$((restarts - 1))
done
# 143: saved after SIGTERM. A run that was over, or failed, does not come back.
if [[ $stopped -eq 1 && $status -eq 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
