#!/usr/bin/env bash
# Ends the SLURM that up.sh started, and its jobs: tests/slurm/down.sh FOLDER
set -euo pipefail
folder=$(cd "${1:?"usage: $0 FOLDER"}" && pwd)
slurm() { SLURM_CONF=$folder/slurm.conf timeout 10 "$@"; }

# Twice: the first signal ends the processes, and keeps no job from requeueing itself; the second ends the jobs.
slurm scancel --quiet --full --signal=KILL --user=root || true
slurm scancel --quiet --user=root || true
for _ in $(seq 50); do
    [ -n "$(slurm squeue --noheader 2> /dev/null)" ] || break
    sleep 0.1
done
for name in slurmd.n1 slurmd.n2 slurmctld munge/munged; do
    [ ! -s "$folder/$name.pid" ] || kill -KILL "$(cat "$folder/$name.pid")" 2> /dev/null || true
done
# Processes of jobs that a daemon which did not answer has left. Again, for what forks.
for _ in 1 2 3; do
    grep -lzsFx "SLURM_CONF=$folder/slurm.conf" /proc/[0-9]*/environ | xargs -r grep -lzs '^SLURM_JOB_ID=' |
        cut -d / -f 3 | xargs -r kill -KILL 2> /dev/null || true
done
