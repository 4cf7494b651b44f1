#!/usr/bin/env bash
# A borrowed hour on a GPU: tests, benchmarks and cards in order of what they settle, as many as MINUTES allow
#
#   tools/gpu_day.sh MINUTES           run them; again at the same commit, it goes on where it stopped
#   tools/gpu_day.sh MINUTES --list    say what would run and what would not
#
# An item is started when the minutes that it may take are left, and ended when they are over; shorter ones behind it
# still run. What passed at this commit is passed over; what failed or was cut off is tried again. One line each, and
# all that it printed, in runs/gpu_day/COMMIT. Settings, by environment: PYTHON (default: python), GPU_DAY (where
# results go), GPU_DAY_ITEMS (a file of other items).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=${1:-} list=${2:-}
if [[ ! $minutes =~ ^[1-9][0-9]{0,3}$ ]] || [[ -n $list && $list != --list ]]; then
    echo "usage: tools/gpu_day.sh MINUTES [--list], with MINUTES from 1 to 9999" >&2
    exit 2
fi
python=${PYTHON:-python}
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
results=${GPU_DAY:-runs/gpu_day}/$commit
export PYTHONPATH=$PWD:$PWD/kernels

# Minutes that it may take, its name, its command. First whether the rehearsal, on which all planning rests, is right;
# then whether numbers are; then how fast they are.
items() {
    if [[ -n ${GPU_DAY_ITEMS:-} ]]; then
        cat "$GPU_DAY_ITEMS"
        return
    fi
    cat <<'ITEMS'
1 base $python tools/image/check_base.py || true
6 rehearsal $python tools/bench.py rehearsal --json examples/cards/rehearsal_gpu.json
4 test-training $python -m pytest -q -m gpu tests/gpu/test_training_numbers.py tests/gpu/test_loader.py tests/gpu/test_layouts.py
3 test-layers $python -m pytest -q -m gpu tests/model
5 test-attention $python -m pytest -q -m gpu tests/context_parallel
8 test-kernels $python -m pytest -q -m gpu tests/kernels
4 test-dali $python -m pytest -q -m gpu tests/gpu/test_dali.py
10 attention $python tools/bench.py attention --json examples/cards/attention.json
25 train $python tools/bench.py train_gpu --json examples/cards/train_gpu.json
10 kernels $python tools/bench.py kernels --json examples/cards/kernels.json
6 loss $python tools/bench.py linear_ce --device cuda --json examples/cards/linear_ce_gpu.json
3 test-benchmarks $python -m pytest -q -m gpu tests/end_to_end
30 train-long $python tools/bench.py train_gpu --large --json examples/cards/train_gpu_large.json
ITEMS
}

if [[ -z $list && -z ${GPU_DAY_ITEMS:-} ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "tools/gpu_day.sh: $python finds no CUDA device here; --list says what would run on one" >&2
    exit 2
fi
started=$SECONDS budget=$((minutes * 60))
say() { printf '%-18s %s\n' "$1" "$2"; }

mkdir -p "$results"
while read -r most name command; do
    [[ -n $most && $most != \#* ]] || continue
    left=$((budget - (SECONDS - started)))
    if [[ -e $results/$name.passed ]]; then
        say "$name" "passed before, at this commit"
    elif ((most * 60 > left)); then
        say "$name" "left out: it may take $most minutes, and $((left / 60)) are left"
    elif [[ $list == --list ]]; then
        say "$name" "would run, at most $most minutes: ${command//\$python/$python}"
        budget=$((budget - most * 60))
    else
        begun=$SECONDS status=0
        rm -f "$results/$name.failed"
        timeout --kill-after=10 $((most * 60)) bash -c "${command//\$python/$python}" \
            </dev/null >"$results/$name.log" 2>&1 || status=$?
        took="after $((SECONDS - begun)) seconds"
        if ((status == 0)); then
            say "$name" "passed $took"
            echo "$took" >"$results/$name.passed"
        else
            ((status == 124 || status == 137)) && took="$took, when its time was over"
            say "$name" "failed $took: $(grep -v '^[[:space:]]*$' "$results/$name.log" | tail -n 1)"
            echo "status $status $took" >"$results/$name.failed"
        fi
    fi
done < <(items) | tee -a "$([[ $list == --list ]] && echo /dev/null || echo "$results/summary.txt")"

[[ $list == --list ]] || echo "$(find "$results" -name '*.passed' | wc -l) passed; see $results"
[[ -z $(find "$results" -name '*.failed' -print -quit) ]]
