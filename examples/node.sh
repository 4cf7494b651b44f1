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
#   PET_MASTER_ADDR, PET_MASTER_PORT   where the first node is met
# and by the user:
#   RUN_LOGS         a folder of this run alone that all nodes see: the processes' logs, what became of each start
#   GRACE_SECONDS    time for the last checkpoint, below what the scheduler gives (default 540)
#   MEET_SECONDS     how long nodes wait for each other (default 600)
#   MAX_RESTARTS     restarts on the same nodes when a process fails (default 3)
#   MAX_STARTS_WITHOUT_PROGRESS   in a row (default 3)
#   PYTHON           default: python
set -euo pipefail

told='' child=''
trap 'told=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM USR1

fail() { echo "node.sh: $(hostname): $1" >&2; exit 2; }
config=${1:?usage: node.sh CONFIG [arguments of train.py run]}
shift
for name in PET_NNODES PET_NPROC_PER_NODE PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT RUN_LOGS; do
    [[ -n ${!name:-} ]] || fail "$name is not set"
done
[[ $PET_NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail "PET_NPROC_PER_NODE=$PET_NPROC_PER_NODE: expected a number"
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
    echo "node.sh: $(hostname): $1, to be started again" >&2
    exit 75
}

if [[ $node -eq 0 ]]; then
    echo launched >>"$outcome" || fail "cannot write $outcome"
    # What is wrong with settings, data or folders is one line from one process, not from hundreds.
    attend "$python" tools/train.py check --processes "$((nodes * processes))" --config "$config" \
        "${settings[@]}" "$@" || { status=$? && [[ -n $told || $status -ne 2 ]] || exit 2; again "the check has failed"; }
else
    # The first node may come minutes later, and its name with it.
    for ((waited = 0; waited < ${MEET_SECONDS:-600}; waited++)); do
        [[ -z $told ]] || again "told to stop"
        ! (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null || break
        sleep 1 &
        wait $! || true
    done
    if [[ $waited -eq ${MEET_SECONDS:-600} ]]; then
        echo "node.sh: $(hostname): $head:$port did not answer in $waited s" >&2
        exit 1
    fi
fi

is_host=$([[ $node -ne 0 ]] || echo 1) status=0
attend "$python" -m megatron_eagle.runtime.torchrun \
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
