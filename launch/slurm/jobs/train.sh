# shellcheck shell=bash disable=SC2154  # what settings.sh sets
# A training job on its first node, from allocation to requeue. Sourced by the batch script, which sets `submission`;
# `settings.sh` there sets the rest. Only bash and Slurm's commands: Python may exist in the ranks' container alone.

# shellcheck source=/dev/null
. "$submission/settings.sh"
if [ -e "$submission/members" ]; then
    run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$submission/members")
fi
restart=${SLURM_RESTART_COUNT:-0}

# record EVENT [KEY VALUE]...: what happened, for `diptych runs`
record() {
    local line
    printf -v line '{"time": %s, "event": "%s", "job": "%s", "restart": %s' \
        "$(date +%s)" "$1" "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" "$restart"
    shift
    while [ $# -gt 0 ]; do
        printf -v line '%s, "%s": "%s"' "$line" "$1" "$2"
        shift 2
    done
    printf '%s}\n' "$line" >>"$run/jobs.jsonl"
    printf '%s %s\n' "$(date '+%F %T')" "$line"
}

newest_checkpoint() {
    local manifests=("$run"/checkpoints/step-*/MANIFEST.json)
    echo "${manifests[-1]}"
}

# requeue REASON: put this job back into the queue; it ends here
requeue() {
    local minute
    if [ -e "$run/cancelled" ]; then
        record end code "$code" why "cancelled"
        exit 75
    fi
    if [ "$restart" -ge "$max_requeues" ]; then
        record end code "$code" why "$1; it was started again $restart times already (cluster.max_requeues)"
        exit 75
    fi
    # For as long as the controller is away. If it has taken the job back or ended it by itself, or has started it again
    # elsewhere because this node was cut off, that must not be disturbed.
    for minute in 0 1 2 3 4 5 6 7 8 9; do
        [ "$minute" = 0 ] || sleep 60
        read -r current state < <(squeue --noheader --jobs="$SLURM_JOB_ID" --Format=RestartCnt,State 2>/dev/null)
        [ -n "$current" ] || continue
        if [ "$current" != "$restart" ] || [ "$state" != RUNNING ]; then
            record end code "$code" why "$1; ended by Slurm ($state)"
            exit 75
        fi
        record end code "$code" why "$1; back into the queue"
        # At its end the job is in the queue already. To wait for being ended would hold the nodes for KillWait.
        scontrol requeue "$SLURM_JOB_ID" && exit 75
    done
    record end code "$code" why "$1; Slurm did not take it back into the queue"
    exit 75
}

# Slurm signals the ranks itself; this shell only must outlive them, to decide what comes next.
trap : INT TERM USR1 USR2

for nodes in $node_counts; do
    [ "$nodes" -gt "$SLURM_JOB_NUM_NODES" ] || break
done
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((12000 + (SLURM_JOB_ID + 101 * restart) % 20000))
# What ranks print before they meet, and how they end; from then on each writes to logs/attempt-.../ of the run.
start="$submission/job-$SLURM_JOB_ID-start-$restart"
mkdir -p "$start"
before=$(newest_checkpoint)
record start nodes "$SLURM_JOB_NODELIST" ranks "$((nodes * tasks_per_node))"
if [ -e "$run/cancelled" ]; then
    record end code 75 why "cancelled"
    exit 75
fi

# shellcheck disable=SC2016  # expanded by the rank's shell, which hears signals from its first moment on
srun --export=ALL --nodes="$nodes" --ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node" \
    --nodelist="$(IFS=,; echo "${hosts[*]}")" --cpus-per-task="$cpus_per_task" \
    --kill-on-bad-exit=1 --wait=60 --unbuffered "${srun_arguments[@]}" \
    bash -c 'trap "asked=yes" INT TERM USR1 USR2
        if [ ! -e "$0/$1" ]; then
            echo "error: node $(hostname) does not see $0: set runs= to a folder that all nodes share" >&2
            exit 2
        fi
        . "$0/rank.sh"' "$submission" "token-$token" "$run" "$start"
code=$?
if [ "$code" = 0 ] && [ -e "$start/resume-me" ]; then
    code=75
fi
# srun gives the highest code, which may be that of a rank that was killed because of another.
cause=$(head -n 1 "$start/failed" 2>/dev/null)
case $cause in
    *"exit code 2" | *"exit code 3") code=${cause##* } ;;
esac
log=$submission/job-$SLURM_JOB_ID.out

case $code in
    0) record end code 0 why "done" ;;
    75) requeue "saved on request" ;;
    138 | 140) requeue "signalled before it had begun" ;;
    2)
        mapfile -t logs < <(sed -n "s/^this rank's log: //p" "$start"/*.log)
        error=$(grep -h '^error: ' "${logs[@]}" "$start"/*.log "$log" 2>/dev/null | tail -n 1)
        record end code 2 why "$(LC_ALL=C tr -d '[:cntrl:]\\"' <<<"$error")"
        ;;
    3)
        code=1
        record end code 1 why "a newer start has taken the run over"
        ;;
    *)
        # A node or a rank was lost. What has come further than before may go on; a mistake would only be repeated.
        if [ "$(newest_checkpoint)" != "$before" ]; then
            requeue "${cause:-srun ended with $code}"
        fi
        record end code "$code" why "${cause:-srun ended with $code}, before the first new checkpoint; see $start"
        ;;
esac
exit "$code"
