#!/usr/bin/env bash
# A first run on this machine, no GPU and no download needed, after bringing the environment up to date: makes a tiny mixture of
# experts, cold-starts it on a generated task, and improves it by GSPO on two ranks with a real SGLang server.
#
#   launch/quickstart.sh                                  the whole way
#   launch/quickstart.sh run.steps=50 optimizer.lr=1e-4   with other settings of the last part (megatron-rl settings lists them)
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    usage
    exit 0
fi
launch/setup.sh

# Every run gets a folder of its own, so that the next one neither finds nor overwrites its checkpoints.
directory="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
program=.venv/bin/megatron-rl
say "making a tiny mixture of experts with random weights"
"$program" toy "$directory/toy"
say "teaching it the task, from a teacher who is right one time in three"
"$program" sft configs/quickstart-sft.yaml "policy.init=$directory/toy" "run.directory=$directory/sft"
say "reinforcement learning: the reward wants what the teacher did one time in three"
"$program" train configs/quickstart.yaml "policy.init=$directory/sft/exports/final" "run.directory=$directory/rl" "$@"
"$program" report "$directory/rl"
say "done. Look at what it did:
    $directory/rl/report.html             the run as a page, for a browser
    $program bank show $directory/rl/bank      what the model said
    $program train --resume $directory/rl run.steps=50      go on"
