#!/usr/bin/env bash
# A job's name and comment as squeue shows them: functions that train.sbatch sources.
#
# They come after requeue.sh. A Slurm that refuses them is passed over.

checked=${logs:?}/checked-$SLURM_JOB_ID # what `train.py check` has said of each run: its folder, its iterations, ...

# `FOLDER ITERATIONS` of the job's runs.
runs() { sed -nE 's/^(.*): [^:]*; ([0-9]+) iterations of .*/\1 \2/p' "$checked"; }

# eagle-RUN, RUN being the folder of checkpoint.path, where the job has no other name than the script's.
name_job() {
    local folder
    [[ ${SLURM_JOB_NAME:-} == megatron-eagle ]] || return 0
    folder=$(runs | head -n 1)
    scontrol update JobId="$SLURM_JOB_ID" JobName="eagle-$(basename "${folder% *}")" >/dev/null 2>&1 || true
}

# `iteration 150 of 2000, saved 100`, of the run that has written last.
comment() {
    local folder total newest='' of='' saved iteration
    while read -r folder total; do
        [[ ! $folder/logs/metrics.jsonl -nt $newest ]] || newest=$folder/logs/metrics.jsonl of=$total
    done < <(runs)
    [[ -n $newest ]] || return 0
    iteration=$(tail -n 1 "$newest" | sed -nE 's/.*"iteration": ([0-9]+).*/\1/p')
    saved=$(awk '/^(started|saved|stopped)/ && $2 { last = $2 } END { print last }' "${outcome:?}" 2>/dev/null || true)
    scontrol update JobId="$SLURM_JOB_ID" Comment="iteration ${iteration:-0} of $of, saved ${saved:-none}" \
        >/dev/null 2>&1 || true
}

# Until it is told to end (SIGTERM).
keep_commenting() {
    local pause
    [[ ${COMMENT_SECONDS:=60} != 0 ]] || return 0
    trap 'kill "$pause"; exit 0' TERM
    while true; do
        sleep "$COMMENT_SECONDS" &
        pause=$!
        wait "$pause"
        comment
    done
}
