#!/usr/bin/env bash
# What slurm/train.sbatch and node.sh have in common: functions for a start of a run, wherever a scheduler made it.

# set_environment LOGS: what every process of a run finds in its environment; NCCL leaves its dumps in the folder LOGS.
set_environment() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} CUDA_DEVICE_MAX_CONNECTIONS=1
    # NCCL's flight recorder, by its names before and after torch 2.11, and where it leaves what a hang was about.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}
    export TORCH_NCCL_TRACE_BUFFER_SIZE=$TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT=1
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$1/nccl_trace_rank_}
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$TORCH_FR_DUMP_TEMP_FILE
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or processes that are restarted find the addresses of those before
    # shellcheck disable=SC2016  # torchrun expands it
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
}

# torchrun (or the scheduler) can only start again what ends; what comes after it in a command wins.
# shellcheck disable=SC2034  # for who sources this
settings=(resilience.abort_on_hang=true)

# A process of `train preflight`: bash -c "$preflight" preflight BAD_NODES CONFIG PYTHON ARGUMENTS... The shell names the
# node where no Python starts, in the file BAD_NODES too; so it is no file itself, which may not be there.
# shellcheck disable=SC2034,SC2016  # for who sources this; the processes expand it
preflight='
    bad() {
        if [[ ${SLURM_LOCALID:-${LOCAL_RANK:-0}} -eq 0 ]]; then
            node=${SLURMD_NODENAME:-${NODE_NAME:-$(hostname)}}
            echo "bad node: $node: $1" >&2
            echo "$node" >>"$bad_nodes" || true
        fi
        exit 3
    }
    bad_nodes=$1 config=$2
    [[ -r $config && -e tools/train.py ]] ||
        bad "cannot read $config and tools/train.py in $PWD: is it on a file system of all nodes?"
    status=0
    "${@:3}" || status=$?
    [[ $status =~ ^(0|2|3|4|1[3-9].)$ ]] ||
        bad "$3 tools/train.py preflight ended with status $status: can it import torch and megatron_eagle?"
    exit "$status"'

# Count, in what runs have noted (`train run --outcome`), the starts in a row up to the last one that have made no
# progress: each begins with a line `launched`. Progress is a checkpoint that is newer than what the start began with,
# or a stage that is finished; that torchrun starts processes again is none.
idle_starts() {
    awk '
        /^launched/ { idle++; stages = 0; delete first }
        /^started/ {
            stage = $0
            sub(/^started [0-9]+/, "", stage)
            if (!(stage in first)) {
                first[stage] = $2
                if (stages++) idle = 0
            }
        }
        /^(started|saved|stopped)/ && $2 > first[stage] { idle = 0 }
        END { print idle + 0 }'
}
