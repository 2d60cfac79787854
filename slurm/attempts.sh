# shellcheck shell=bash disable=SC2154  # run, the run's folder, is the job's
# What a job does when its training has ended: nothing more, the same again, or give up. Sourced by the jobs.
#
# Judged by the run's status.json, which training replaces as a whole, and never by an exit status: launchers hide it.

MOST_ATTEMPTS=3 # in a row that end at the checkpoint they began with

# USR1 comes some time before the time limit (--signal), TERM when SLURM ends the job.
is_told_to_stop=0 is_passed_on=0 srun=
trap 'is_told_to_stop=1; [ -z "$srun" ] || tell_training_to_stop' USR1 TERM

# run_step COMMAND...: runs srun, and comes back when it has ended, whatever signals come meanwhile.
run_step() {
    step_status=0
    [ "$is_told_to_stop" = 0 ] || return 0
    "$@" &
    srun=$!
    [ "$is_told_to_stop" = 0 ] || tell_training_to_stop
    while kill -0 "$srun" 2> /dev/null; do
        wait "$srun" && step_status=0 || step_status=$? # a trapped signal ends `wait` early
    done
    srun=
}

# Tells every process of the step; a signal sent before there is a step would be lost without a word.
tell_training_to_stop() {
    [ "$is_passed_on" = 0 ] || return 0
    is_passed_on=1
    echo "told to stop: so is the step"
    for _ in $(seq 100); do
        ! squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep -q '\.[0-9]' || break
        sleep 0.1
    done
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}

# job FIELD: JobState and the like, as SLURM knows them.
job() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/.*\<$1=\([^ ]*\).*/\1/p"; }

# status FIELD: "state" or "step" in status.json; nothing before its first status.json.
status() { sed -n '/null/d; s/^ *"'"$1"'": *"\{0,1\}\([a-z0-9]*\).*/\1/p' "$run/status.json" 2> /dev/null || true; }

# How the run stands. One that was killed could not say so; but it holds the folder's lock no more.
state() {
    local state
    state=$(status state)
    [ "$state" != running ] || ! flock --shared --nonblock "$run/.lock" true || state=died
    echo "$state"
}

# Whether the job lost its place, rather than failed. Preemption signals the step alone, not this script.
is_preempted() { [ "$is_told_to_stop" = 1 ] || [[ $(job PreemptTime) == [0-9]* ]]; }

# A cancelled job that requeues itself comes back to life, and one that was requeued is started again anyway.
require_running() { [ "$(job JobState)" = RUNNING ] || fail "SLURM is ending this job"; }

requeue() {
    echo "requeue"
    scontrol requeue "$SLURM_JOB_ID" || fail "SLURM does not requeue this job; submit it again to go on"
    sleep infinity # until SLURM ends this script: a job that ends by itself is not started again
}

# Where a node does not answer, waits until SLURM has noticed and requeues the job itself. A job that is quicker than
# that was granted no GPUs when it started again (SLURM 22.05).
wait_for_lost_nodes() {
    local seconds
    ! srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 true || return 0
    seconds=$(scontrol show config | sed -n 's/^SlurmdTimeout *= \([0-9]*\) sec.*/\1/p')
    echo "a node does not answer: SLURM requeues this job when it has noticed, within some $seconds s"
    sleep $((seconds + 60))
}

# Counts this attempt, and gives up if the last ones came to nothing. The count outlives requeues, as these come from
# outside too; a job that somebody submitted begins anew.
begin_attempt() {
    local last_step=none last_attempts=0
    [ "$is_submitted" = 1 ] || [ ! -f "$run/attempts" ] || read -r last_step last_attempts < "$run/attempts"
    is_first=$is_submitted is_submitted=0
    first_step=$(status step)
    first_step=${first_step:-0}
    attempts=1
    [ "$last_step" != "$first_step" ] || attempts=$((last_attempts + 1))
    [ "$attempts" -le "$MOST_ATTEMPTS" ] || give_up
    echo "$first_step $attempts" > "$run/attempts"
}
is_submitted=$((${SLURM_RESTART_COUNT:-0} == 0))

# Ends the job, for now or for good; comes back if training is to be started again at once, on the same nodes.
judge_attempt() {
    local state step
    state=$(state) step=$(status step)
    if [ "$state" = finished ]; then
        echo "finished: step $step"
        exit 0
    fi
    [ "$run/status.json" -nt "$run/attempts" ] || state= # an earlier attempt's
    echo "attempt $attempts from step $first_step ended: state ${state:-unknown}, step ${step:-0}, status $step_status"
    require_running
    if is_preempted; then
        requeue
    elif [ -z "$state" ] && [ "$is_first" = 1 ]; then # later it may be a lost node, and is no wrong option
        fail "training did not begin; the reason is in $run/slurm-$SLURM_JOB_ID-node*.log"
    elif [ "$state" = interrupted ]; then
        requeue
    elif [ "${step:-0}" = "$first_step" ]; then
        [ "$attempts" -lt "$MOST_ATTEMPTS" ] || give_up
        wait_for_lost_nodes
        requeue # other nodes may do better
    fi
    echo "training failed, but had come further: again"
}

give_up() {
    fail "$MOST_ATTEMPTS attempts in a row ended at the checkpoint of step $first_step; there are no more. The reason" \
        "is in $run/slurm-$SLURM_JOB_ID-node*.log; submit the job again to go on"
}
