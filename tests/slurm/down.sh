#!/usr/bin/env bash
# Ends the SLURM that up.sh started, and every process of its jobs: tests/slurm/down.sh FOLDER
set -euo pipefail
folder=$(cd "${1:?"usage: $0 FOLDER"}" && pwd)
export SLURM_CONF=$folder/slurm.conf

end() { # PID_FILE: ends that process, at most 5 s later
    local pid
    [ -s "$1" ] && pid=$(cat "$1") || return 0
    kill "$pid" 2> /dev/null || return 0
    for _ in $(seq 50); do
        kill -0 "$pid" 2> /dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2> /dev/null || true
}

scancel --state=PENDING --user=root 2> /dev/null || true
scancel --signal=KILL --full --user=root 2> /dev/null || true
scancel --user=root 2> /dev/null || true
for _ in $(seq 30); do
    [ -n "$(squeue --noheader 2> /dev/null)" ] || break
    sleep 0.1
done
for daemon in slurmd.n1 slurmd.n2 slurmctld munge/munged; do
    end "$folder/$daemon.pid"
done
