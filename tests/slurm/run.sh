#!/usr/bin/env bash
# Runs the toy model on a real SLURM on this machine: a controller and three nodes on loopback, in a temporary folder. Submits,
# preempts, kills a node, and prints what became of it. Takes about twelve minutes; needs no GPU. Ends all that it has started.
#
#   tests/slurm/run.sh                      every scenario
#   tests/slurm/run.sh --only completes     some: --help tells which there are
#   PYTHON=/path/to/python tests/slurm/run.sh     with another environment than .venv
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../../launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch/common.sh"
cd "$root"
bring_slurm
export PYTHONPATH="$root"
exec "${PYTHON:-.venv/bin/python}" -m tests.slurm.scenarios "$@"
