#!/usr/bin/env bash
# One node of a training run, where a scheduler starts the same command on each: node.sh CONFIG [a.b=c ...]
#
# SIGTERM or SIGUSR1: the step under way ends, a checkpoint is saved. The status is for the scheduler:
#   0    trained to the end
#   75   start all nodes again: stopped and saved, or failed on the way
#   2    not again: settings, data or disk are at fault, or starts in a row have saved nothing new
#   1    the first node was not met: again, a few times
#
# Which node this is, by torchrun's own variables (Kubeflow Trainer sets them, the others' files do):
#   PET_NNODES, PET_NODE_RANK   nodes, and this one, from 0
#   PET_NPROC_PER_NODE          processes on each, a number
#   PET_MASTER_ADDR, PET_MASTER_PORT   where the first node is met; for the preflight at the port after it
# and by the user:
#   RUN_LOGS         a folder of this run alone that all nodes see: the processes' logs, what became of each start
#   GRACE_SECONDS    time for the last checkpoint, below what the scheduler gives (default 540)
#   MEET_SECONDS     how long nodes wait for each other (default 600)
#   MAX_RESTARTS     restarts on the same nodes when a process fails (default 3)
#   MAX_STARTS_WITHOUT_PROGRESS   in a row (default 3)
#   NODE_NAME        the machine's name, for messages, which have the host's name as well
#   NETWORK          a file of the network's settings, read before every command: see slurm/network.sh
#   PREFLIGHT        no: the nodes are not looked at before (train preflight)
#   PREFLIGHT_SECONDS   how long each part of that may take (default 120)
#   PYTHON           default: python
set -euo pipefail

told='' child=''
trap 'told=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM USR1

NODE_NAME=$(hostname)${NODE_NAME:+@$NODE_NAME}
export NODE_NAME
fail() { echo "node.sh: $NODE_NAME: $1" >&2; exit 2; }
config=${1:?usage: node.sh CONFIG [arguments of train.py run]}
shift
for name in PET_NNODES PET_NPROC_PER_NODE PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT RUN_LOGS; do
    [[ -n ${!name:-} ]] || fail "$name is not set"
done
for name in PET_NNODES PET_NPROC_PER_NODE; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: expected a number"
done
[[ $PET_NODE_RANK =~ ^[0-9]+$ && $PET_NODE_RANK -lt $PET_NNODES ]] ||
    fail "PET_NODE_RANK=$PET_NODE_RANK contradicts PET_NNODES=$PET_NNODES: nodes count from 0"
[[ ${PREFLIGHT:=yes} =~ ^(yes|no)$ ]] || fail "PREFLIGHT=$PREFLIGHT: expected yes or no"
cd "$(dirname "$(dirname "$(realpath "$0")")")"
nodes=$PET_NNODES processes=$PET_NPROC_PER_NODE node=$PET_NODE_RANK head=$PET_MASTER_ADDR port=$PET_MASTER_PORT
unset "${!PET_@}" # what torchrun would take beside what it is told
[[ -r $config ]] || fail "cannot read $config: is its file system mounted?"
mkdir -p "$RUN_LOGS" || fail "cannot make the folder RUN_LOGS=$RUN_LOGS"
python=${PYTHON:-python}
outcome=$RUN_LOGS/outcome # what becomes of all starts, in the run's own words: train run --outcome

# shellcheck source=examples/launch.sh
source examples/launch.sh
set_environment "$RUN_LOGS"
# shellcheck source=examples/slurm/place.sh
source examples/slurm/place.sh
CONTAINER_IMAGE='' make_place "$PWD" # the scheduler's containers are around this script

# Run a program and pass a signal on to it; its status.
attend() {
    local status
    "$@" &
    child=$!
    [[ -z $told ]] || kill -TERM "$child" 2>/dev/null || true
    while true; do # a trapped signal ends `wait` early
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=''
    return "$status"
}
# End as one that has not trained to the end.
again() {
    local limit=${MAX_STARTS_WITHOUT_PROGRESS:-3}
    [[ $(idle_starts <"$outcome") -lt $limit ]] || fail "$limit starts in a row have saved nothing new: see $RUN_LOGS"
    echo "node.sh: $NODE_NAME: $1, to be started again" >&2
    exit 75
}
# Wait for the first node at a port: it may come minutes later, and its name with it.
meet() {
    local waited
    [[ $node -ne 0 ]] || return 0
    for ((waited = 0; waited < ${MEET_SECONDS:-600}; waited++)); do
        [[ -z $told ]] || again "told to stop"
        ! (exec 3<>"/dev/tcp/$head/$1") 2>/dev/null || return 0
        sleep 1 &
        wait $! || true
    done
    echo "node.sh: $NODE_NAME: $head:$1 did not answer in $waited s" >&2
    exit 1
}
# This node's processes of the preflight, each in a group of its own; the highest of their statuses.
# shellcheck disable=SC2317  # `attend` calls it
look() {
    local i running=() worst=0 status
    set -m
    trap 'kill -- "${running[@]/#/-}" 2>/dev/null; wait; exit 143' TERM
    for ((i = 0; i < processes; i++)); do
        env RANK="$((node * processes + i))" WORLD_SIZE="$((nodes * processes))" LOCAL_RANK="$i" \
            LOCAL_WORLD_SIZE="$processes" MASTER_ADDR="$head" MASTER_PORT="$((port + 1))" \
            "${place[@]}" bash -c "$preflight" preflight "$bad_nodes" "$config" "$python" \
            tools/train.py preflight --config "$config" --seconds "${PREFLIGHT_SECONDS:-120}" \
            --meet-seconds "${MEET_SECONDS:-600}" \
            --writes "$RUN_LOGS" --bad-nodes "$bad_nodes" "${settings[@]}" "$@" &
        running+=($!)
    done
    for i in "${running[@]}"; do
        wait "$i" && status=0 || status=$?
        [[ $status -le $worst ]] || worst=$status
    done
    return "$worst"
}

bad_nodes=$RUN_LOGS/bad-nodes # as the preflight of this start finds them
if [[ $node -eq 0 ]]; then
    echo launched >>"$outcome" || fail "cannot write $outcome"
    rm -f "$bad_nodes"
    # What is wrong with settings, data or folders is one line from one process, not from hundreds.
    attend "${place[@]}" "$python" tools/train.py check --processes "$((nodes * processes))" --config "$config" \
        "${settings[@]}" "$@" || { status=$? && [[ -n $told || $status -ne 2 ]] || exit 2; again "the check has failed"; }
fi
if [[ $PREFLIGHT == yes ]]; then
    meet "$((port + 1))"
    status=0
    attend look "$@" || status=$?
    [[ -z $told ]] || again "told to stop"
    [[ $status -ne 2 ]] || exit 2 # what is wrong on all nodes alike
    names=$(sort -u "$bad_nodes" 2>/dev/null | paste -sd, || true)
    [[ $status -eq 0 ]] || again "the preflight has ended with status $status${names:+ and names $names}"
fi
meet "$port"

is_host=$([[ $node -ne 0 ]] || echo 1) status=0
attend "${place[@]}" "$python" -m megatron_eagle.runtime.torchrun \
    --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-id eagle --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
    --rdzv-conf "join_timeout=${MEET_SECONDS:-600},is_host=${is_host:-0}" \
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "${GRACE_SECONDS:-540}" \
    --log-dir "$RUN_LOGS/%h" --tee 3 \
    tools/train.py run --config "$config" --outcome "$outcome" "${settings[@]}" "$@" || status=$?

last=$(tail -n 1 "$outcome")
[[ $last != failed ]] || exit 2
[[ $status -ne 0 || $last == stopped* ]] || exit 0
again "${told:+told to stop, }torchrun has ended with status $status"
