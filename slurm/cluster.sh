# shellcheck shell=bash
# All that is particular to one cluster. Read it before submitting, from the project's folder; the jobs read it too:
#
#     . slurm/cluster.sh
#     sbatch --nodes=2 --gpus-per-node=4 slurm/pretrain.sbatch results/mine data/cifar10/train.beton cifar10-simclr-100
#
# Or keep a changed copy elsewhere, and `export CLUSTER=/that/copy.sh` before submitting: the code stays as committed.

# sbatch reads these; options of sbatch itself go before them.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project

# Which network the processes of several nodes use, where they choose a wrong one (`ip -brief address` names them).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Words put before every command that trains or evaluates, on its node; `bash` and `python` are then the container's.
# shellcheck disable=SC2034  # the jobs use it
container=()
# container=(apptainer exec --nv --bind "$PWD" my-image.sif)

# Makes `python` the one that has the project's packages; called in the job, in the project's folder.
load_environment() {
    # module load cuda/13.0
    [ -x "${VENV:-.venv}/bin/python" ] ||
        fail "there is no Python in ${VENV:-.venv}: run scripts/setup.sh, or change load_environment in slurm/cluster.sh"
    activate # .venv, which scripts/setup.sh makes, or the environment in VENV
}
