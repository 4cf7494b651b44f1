#!/usr/bin/env bash
# Whether a job starts again, and where: functions that train.sbatch sources.
#
# They come after launch.sh, with `logs` as the folder of the processes' logs. There they keep
#   outcome-JOB         what becomes of this start, in the run's own words: `train.py run --outcome`
#   history-JOB.jsonl   a line for each start: when, on which nodes, its last checkpoint, how it ended, and why
#   excluded-JOB        nodes to which the job does not go again, the oldest first
#   start-JOB           when and where the start under way began
#   most-JOB            the most nodes that a start has had

outcome=${logs:?}/outcome-$SLURM_JOB_ID
history=$logs/history-$SLURM_JOB_ID.jsonl
excluded=$logs/excluded-$SLURM_JOB_ID
began=$logs/start-$SLURM_JOB_ID
most=$logs/most-$SLURM_JOB_ID
srun_said=$logs/srun-$SLURM_JOB_ID # of the processes, where srun has started them
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
patience=1800 # seconds for a Slurm that does not answer, or has to end this script
unusable=' (down|drain|fail)|\*$' # states of nodes that Slurm does not reach, or gives to nobody any more

# job_field NAME [JOB]: a field of `scontrol show job`; empty for (null).
job_field() {
    [[ " $(scontrol show job --oneliner "${2:-$SLURM_JOB_ID}")" =~ \ $1=([^ ]*) ]] || return 0
    [[ ${BASH_REMATCH[1]} == "(null)" ]] || echo "${BASH_REMATCH[1]}"
}

# `NODE STATE` of nodes, by options of sinfo that choose them.
node_states() { sinfo --noheader --Node "$@" --format="%N %T" 2>/dev/null | sort -u; }

# Lines that are none of these words.
without() { grep -vxFf <(printf '%s\n' "$@") || true; }

# Nodes that the user has excluded, and not this script.
excluded_by_user() { scontrol show hostnames "$(job_field ExcNodeList)" 2>/dev/null | grep -vxFf "$excluded" || true; }

# All nodes on which the user lets the job run.
usable_nodes() {
    node_states --partition="$(job_field Partition)" | grep -vE "$unusable" | cut -d' ' -f1 |
        grep -vxFf <(excluded_by_user) || true
}

# Of these, those that this start could take in place of its own: neither its own, nor left out.
spare_nodes() { usable_nodes | without "${hosts[@]}" | grep -vxFf "$excluded" || true; }

# Whether this start has saved anything new, or finished a stage.
progressed() { [[ $({ echo launched; cat "$outcome" 2>/dev/null || true; } | idle_starts) -eq 0 ]]; }

# A start begins. One before it that has not come to its end was ended by Slurm, or with its node.
begin_history() {
    local down
    # Slurm says to later starts alone which they are; the first may have it of a job in which sbatch was called.
    [[ $(job_field Restarts) != 0 ]] || SLURM_RESTART_COUNT=0
    if [[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]]; then
        rm -f "$began" "$excluded" "$history" "$most" # of another job of this number
        # In a chain of stages: what the one before has handed on.
        [[ -z ${AFTER_JOB:-} ]] || cp "${RANK_LOGS:-$SLURM_SUBMIT_DIR/eagle-$AFTER_JOB-ranks}/excluded-$AFTER_JOB" \
            "$excluded" 2>/dev/null || true
    fi
    touch "$excluded" "$history" "$most"
    [[ $SLURM_JOB_NUM_NODES -le $(<"$most") ]] || echo "$SLURM_JOB_NUM_NODES" >"$most"
    if [[ -s $began ]]; then
        down=$(node_states --nodes="$(cut -d' ' -f2 "$began")" | grep -E "$unusable" || true)
        end_history gone "ended by Slurm, or with its node${down:+: Slurm says ${down//$'\n'/, }}"
        [[ -z $down ]] || cut -d' ' -f1 <<<"$down" >>"$excluded" # at the next requeue
    fi
    rm -f "$outcome" "$logs"/*/"ended-$SLURM_JOB_ID"
    echo "$(date +%FT%T) $SLURM_JOB_NODELIST" >"$began"
}

# end_history HOW WHY [NODES]: the line of this start. HOW: finished, stopped, failed, mistake (again would not help) or
# gone. NODES: to which the job does not go again.
end_history() {
    local start nodes saved new=false line='{"job": %s, "start": "%s", "end": "%s", "nodes": "%s", "saved": %s, '
    line+='"progress": %s, "how": "%s", "why": "%s", "excluded": "%s"}\n'
    read -r start nodes <"$began"
    saved=$(awk '/^(started|saved|stopped)/ { last = $2 } END { print last }' "$outcome" 2>/dev/null || true)
    ! progressed || new=true
    # shellcheck disable=SC2059  # it is the format
    printf "$line" "$SLURM_JOB_ID" "$start" "$(date +%FT%T)" "$nodes" "${saved:-null}" "$new" "$1" \
        "$(printf %s "$2" | tr '"\\\t\n' "'/  ")" "${3:-}" >>"$history" || return 1
    rm -f "$began"
}

# Lines of the history for people.
report() {
    local field='"([^"]*)"'
    sed -E "s/.*\"start\": $field, \"end\": $field, \"nodes\": $field, \"saved\": ([^,]*),.*\"why\": $field.*/\
    \1 to \2 on \3, saved \4: \5/"
}

# How the run has ended, `KIND NODE WORDS` for each node that could say it (runtime/torchrun.py). srun says the same
# of its tasks; only the first has ended by itself.
ends() {
    local kind names words
    if [[ $LAUNCH == torchrun ]]; then
        cat "$logs"/*/"ended-$SLURM_JOB_ID" 2>/dev/null || true
        return
    fi
    read -r names words < <(sed -nE 's/^srun: error: ([^ ]+): (tasks? .*)/\1 \2/p' "$srun_said") || return 0
    case $words in
        *Terminated) kind=told ;;
        *"exit code 70") kind=hang ;; # of a run that has found that it hangs
        *"exit code "[1-9] | *"exit code "[1-9][0-9] | *"exit code 1"[01][0-9]) kind=error ;;
        *) kind=killed ;;
    esac
    scontrol show hostnames "$names" | sed "s/.*/$kind & $words/"
}

# The ranks that are behind in the last report of a hang, or the host that is cut off: `NODE the report`.
hangs() {
    local said
    said=$(find "$logs" \( -path "*/${SLURM_JOB_ID}_*" -o -name 'rank_*' \) -name '*.log' -newer "$began" \
        -exec grep -hoE 'hang: .*' {} + | tail -n 1)
    [[ $said != *"all in the same phase"* && $said != *"do not reach"* ]] || return 0
    grep -oE '(host|rank [0-9]+ on) [^ ]+' <<<"${said%%;*}" | sed "s|.* ||; s|\$| ${said//|/}|" | sort -u || true
}

# Leave in `why` how a run has failed, and in `bad` the nodes that it names: at most half of them, or none. What Slurm
# says comes first, then a process that was killed, an error of its own, a hang, and last the nodes that say nothing
# where the others have lost them.
blame() {
    local said kind names
    said=$(ends)
    why='' bad=()
    for kind in down killed error hang lost; do
        [[ $kind == down ]] || grep -q "^$kind " <<<"$said" || continue
        case $kind in
            down) names=$(node_states --nodes="$SLURM_JOB_NODELIST" | grep -E "$unusable" || true) ;;
            hang) names=$(hangs) ;;
            lost) names=$(printf '%s\n' "${hosts[@]}" | without "$(cut -d' ' -f2 <<<"$said")" |
                sed 's/$/ said nothing, and the others have lost it/') ;;
            *) names=$(sed -n "s/^$kind //p" <<<"$said") ;;
        esac
        [[ -n $names ]] || continue
        why=${why:-$(awk '{ sub(" ", ": "); print }' <<<"$names" | head -n 3 | paste -sd';' -)}
        mapfile -t bad < <(cut -d' ' -f1 <<<"$names" | sort -u)
        [[ $((2 * ${#bad[@]})) -gt ${#hosts[@]} ]] || return 0
        bad=()
    done
    why=${why:-$(paste -sd';' - <<<"${said:-no process has said why}")}
}

# leave_out TAKES USABLE NODE...: add them to `excluded`, of which `out` is what is in it then. Where too few others of
# the usable ones would be left for a job that takes so many, the oldest come back, and it is said.
leave_out() {
    local takes=$1 usable=$2 left back
    mapfile -t out < <(cat "$excluded"; printf '%s\n' "${@:3}" | grep . | grep -vxFf "$excluded")
    while left=$(without "${out[@]}" <<<"$usable" | wc -l) && [[ -n $usable && $left -lt $takes ]]; do
        back=$(printf '%s\n' "${out[@]}" | grep -m1 -xFf <(echo "$usable")) || break # they would not help
        echo "only $left other nodes, and the job takes $takes: $back is not left out"
        mapfile -t out < <(printf '%s\n' "${out[@]}" | without "$back")
    done
    printf '%s\n' "${out[@]}" | grep . >"$excluded" || true
}

# A stage is done: the one that waits for it goes without the nodes that it has left out, too.
pass_on() {
    local job depends command theirs usable out
    [[ -s $excluded ]] || return 0
    usable=$(usable_nodes)
    while read -r job depends command; do
        [[ $depends =~ :$SLURM_JOB_ID([^0-9]|$) && $command == */train.sbatch* ]] || continue
        leave_out "$(job_field NumNodes "$job" | sed 's/.*-//' | numfmt --from=iec)" "$usable" # 2-1K: 1024
        [[ -s $excluded ]] || return 0
        theirs=$(job_field ExcNodeList "$job")
        scontrol update JobId="$job" ExcNodeList="${theirs:+$theirs,}$(paste -sd, "$excluded")" &&
            echo "job $job, which waits for this one, goes without $(paste -sd, "$excluded"), too"
    done < <(squeue --noheader --states=PENDING --format='%i %E %o')
}

# Before anything is done to the job: it may not be this start's any more. Slurm requeues jobs itself, and a node that was
# cut off runs this script on when the job has long started on others; a requeue from here would stop it there.
leave_to_later_start() {
    local state starts waited=0
    while state=$(job_field JobState 2>/dev/null) && [[ -z $state && $waited -lt $patience ]]; do
        [[ $waited -gt 0 ]] || echo "Slurm does not answer; waiting for it"
        sleep 5
        waited=$((waited + 5))
    done
    starts=$(job_field Restarts)
    [[ ${starts:-0} -gt ${SLURM_RESTART_COUNT:-0} ]] || return 0
    echo "Slurm itself has requeued job $SLURM_JOB_ID: this start ends, and leaves it alone"
    # Where this script ends before its node is there again, slurmd there takes the job for running from then on: it
    # would refuse it, and the node would be drained (Duplicate jobid). Slurm ends the script when it sees the node.
    [[ $state == COMPLETING ]] || sleep "$patience"
    exit 1
}

# give_up HOW WHY MESSAGE [LINES]: the job ends, and says what so many starts have come to.
give_up() {
    end_history "$1" "$2" "$(paste -sd, "$excluded")" || true
    echo "$3: not again" >&2
    grep "\"how\": \"${5:-}" "$history" | tail -n "${4:-1}" | report >&2
    exit 1
}

# requeue HOW WHY [NODE...]: to the queue, without these nodes; it does not return. HOW: stopped (by a signal), or
# failed, for which MAX_REQUEUES counts. Not when the job was cancelled, or has come too often with nothing to show.
requeue() {
    local said="$2; job $SLURM_JOB_ID" idle=0 failures before theirs usable out wanted
    trap '' TERM USR1 # with which Slurm ends what it requeues, and it must still hear which nodes to leave out
    leave_to_later_start
    if [[ $(job_field JobState) != RUNNING ]]; then
        echo "$said was cancelled, or Slurm itself requeues it"
        exit 1
    fi
    progressed || idle=$(tac "$history" |
        awk '/"progress": true/ { exit } !/"how": "gone"/ { count++ } END { print count + 1 }')
    failures=$(grep -c '"how": "failed"' "$history" || true)
    [[ $1 != failed ]] || failures=$((failures + 1))
    if [[ $idle -gt ${MAX_REQUEUES_WITHOUT_PROGRESS:-3} ]]; then
        give_up "$1" "$2" "$said was requeued $((idle - 1)) times in a row without a new checkpoint" "$idle"
    elif [[ $1 == failed && $failures -gt ${MAX_REQUEUES:-10} ]]; then
        give_up "$1" "$2" "$said has failed $failures times, and MAX_REQUEUES is ${MAX_REQUEUES:-10}" 10 failed
    fi
    before=$(job_field ExcNodeList)
    mapfile -t theirs < <(excluded_by_user)
    usable=$(usable_nodes)
    # Of a range of nodes (`--nodes=1-2`) the most counts. Slurm says it of jobs that wait, and not before this one is gone.
    leave_out "$(<"$most")" "$usable" "${@:3}"
    # What is not written cannot be counted: a job on a full disk would be requeued for ever.
    if ! end_history "$1" "$2" "$(paste -sd, "$excluded")"; then
        echo "$said; $history cannot be written (is its disk full?): not again" >&2
        exit 1
    fi
    # From here on it waits, and Slurm ends this script within KillWait.
    scontrol requeue "$SLURM_JOB_ID" || { echo "$said cannot go back to the queue: not again" >&2; exit 1; }
    wanted=$(printf '%s\n' "${theirs[@]}" "${out[@]}" | grep . | paste -sd, - || true)
    [[ -z $before$wanted ]] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$wanted" ||
        echo "Slurm does not let the job leave nodes out"
    echo "$said goes back to the queue${wanted:+, without $wanted}"
    exit 0
}
