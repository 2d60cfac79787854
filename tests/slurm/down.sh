#!/usr/bin/env bash
# Ends the SLURM that up.sh started, and its jobs: tests/slurm/down.sh FOLDER
set -euo pipefail
folder=$(cd "${1:?"usage: $0 FOLDER"}" && pwd)
export SLURM_CONF=$folder/slurm.conf

# Twice: the first signal ends the processes, and keeps no job from requeueing itself; the second ends the jobs.
timeout 10 scancel --quiet --full --signal=KILL --user=root || true
timeout 10 scancel --quiet --user=root || true
for _ in $(seq 50); do
    [ -n "$(timeout 10 squeue --noheader 2> /dev/null)" ] || break
    sleep 0.1
done
for name in slurmd.n1 slurmd.n2 slurmctld munge/munged; do
    [ ! -s "$folder/$name.pid" ] || kill -KILL "$(cat "$folder/$name.pid")" 2> /dev/null || true
done
