#!/usr/bin/env bash
# Starts a SLURM of two nodes on this machine, for tests: tests/slurm/up.sh FOLDER, as root; down.sh ends it.
#
# Everything lies in FOLDER, which must be empty or absent; nothing of a SLURM that the machine may have is used. The
# packages of Debian: slurmctld, slurmd, slurm-client, munge. Afterwards SLURM_CONF=FOLDER/slurm.conf leads sbatch
# and the other commands to it.
#
# Partition "low" is the default; jobs in "high" preempt those in "low", which are told 5 seconds before.
set -euo pipefail
folder=${1:?"usage: $0 FOLDER"}
mkdir -p "$folder"/{munge,log,state,n1,n2}
folder=$(cd "$folder" && pwd)
chmod 755 "$folder"
host=$(hostname -s)

free_ports() { # N of them, that nobody listens on
    python3 - "$1" << 'END'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in sockets))
END
}
read -r controller node1 node2 < <(free_ports 3)

# Why the values that are not obvious:
#   cred_expire            a requeued job is held for that long, 120 s by default; 5 is the least
#   linuxproc, none, none  no control groups, which a container may not manage
#   config_overrides       nodes may claim more cores than there are
#   Gres                   SLURM asks of a GPU only that it is a character device
cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$node1 CPUs=8 RealMemory=1000 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$node2 CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=5
PartitionName=high Nodes=n1,n2 PriorityTier=10
END
cat > "$folder/gres.conf" << END
NodeName=n1,n2 Name=gpu File=/dev/null
NodeName=n1,n2 Name=gpu File=/dev/zero
END
echo "CgroupPlugin=cgroup/v1" > "$folder/cgroup.conf"

(umask 077 && head -c 1024 /dev/urandom > "$folder/munge/key")
chown -R munge:munge "$folder/munge"
su -s /bin/sh munge -c "munged --key-file='$folder/munge/key' --socket='$folder/munge/socket' \
    --pid-file='$folder/munge/munged.pid' --log-file='$folder/munge/log' --seed-file='$folder/munge/seed'"
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd -N n1
slurmd -N n2

for _ in $(seq 100); do
    [ "$(sinfo --noheader --partition=low --states=idle --format=%D)" != 2 ] || exit 0
    sleep 0.1
done
sinfo --Node --long >&2
tail -n 20 "$folder"/log/* >&2
echo "$0: the two nodes were not ready within 10 s" >&2
exit 1
