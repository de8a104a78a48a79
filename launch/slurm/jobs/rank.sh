# shellcheck shell=bash disable=SC2154  # what settings.sh sets
# One rank of a training job: takes its place from Slurm's variables, and loses no signal.
# Sourced with the arguments SUBMISSION TOKEN RUN START, MASTER_ADDR and MASTER_PORT in the environment, and signals
# trapped: `asked` is set when one came. What this shell hears it repeats to the rank until that ends: Python would be
# killed by a signal that comes before its handlers are there, so it starts with signals ignored.
submission=$0
# shellcheck source=/dev/null
. "$submission/settings.sh"
# After the settings, whose run is only the first one of a sweep.
run=$2 start=$3
failed="$start/failed"
exec >>"$start/$(printf 'rank-%04d.log' "$SLURM_PROCID")" 2>&1
echo "--- $(date '+%F %T'): rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS starts on $(hostname)"

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$tasks_per_node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}
export PYTHONPATH="$submission/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
[ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || export DS_ACCELERATOR=cpu

trap '' INT TERM USR1 USR2
"${python[@]}" -P -m pretrain.training "$run" &
rank=$!
trap 'asked=yes' INT TERM USR1 USR2

if [ -z "${asked:-}" ]; then
    wait "$rank"
    code=$?
fi
seconds=0
while kill -0 "$rank" 2>/dev/null; do
    # A signal came. After a failure elsewhere this rank is stuck, most likely, and nobody waits for it longer than this.
    kill -TERM "$rank"
    [ ! -e "$failed" ] || seconds=$((seconds + 1))
    [ "$seconds" -lt 5 ] || kill -KILL "$rank"
    sleep 1
done
if [ -n "${asked:-}" ]; then
    wait "$rank"
    code=$?
fi
case $code in
    0) ;;
    75)
        # For srun, a code other than 0 is a reason to kill the ranks that are not quite as fast.
        : >"$start/resume-me"
        code=0
        ;;
    *) echo "rank $RANK on $(hostname): exit code $code" >>"$failed" ;;
esac
exit "$code"
