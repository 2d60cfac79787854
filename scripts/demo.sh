#!/usr/bin/env bash
# The main job from end to end on the built-in data set: scripts/demo.sh
#
# Sets everything up (scripts/setup.sh), draws and converts the shapes, pretrains, trains the linear classifier
# and writes the report. Needs neither a GPU nor, once set up, a network. Options for pretraining may follow:
# scripts/demo.sh --seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

data=data/shapes
run=results/demo
prepare_data=(python -m data_prep shapes --output "$data")
pretrain=(accelerate launch --config_file accelerate_configs/cpu.yaml train_simclr.py demo --output "$run")
probe=(python linear_probe.py --run "$run")

scripts/setup.sh
activate
# accelerate would count all cores of the machine, whatever this process may use, and say that it had to guess.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

stage "data: ${prepare_data[*]}"
"${prepare_data[@]}"
stage "pretraining: ${pretrain[*]} $*"
"${pretrain[@]}" "$@"
stage "linear probe: ${probe[*]}"
"${probe[@]}"
stage "done. The report: $run/probe-linear/report.html (and report.md beside it)"
