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
# Slurm's signal before the time limit means nothing here, and would only kill the evaluation early.
# shellcheck disable=SC2016
srun --export=ALL --nodes=1 --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${srun_arguments[@]}" bash -c 'trap "" USR2; exec "$@"' bash \
    "${python[@]}" -P -m launch.cli evaluate context "$run"
