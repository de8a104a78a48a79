# shellcheck shell=bash disable=SC2154  # what settings.sh sets
# The evaluation of a trained run. Sourced by its batch script, which sets `submission`.

# shellcheck source=/dev/null
. "$submission/settings.sh"
if [ -e "$submission/members" ]; then
    run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$submission/members")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONPATH="$submission/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || export DS_ACCELERATOR=cpu
srun --export=ALL --nodes=1 --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${srun_arguments[@]}" "${python[@]}" -P -m launch.cli evaluate context "$run"
code=$?

# Interrupted (exit code 75) it goes on where it was. (When it is cancelled this shell ends at once.)
if [ "$code" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$max_requeues" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
