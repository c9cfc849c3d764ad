#!/usr/bin/env bash
# A first run on this machine, no GPU needed, after bringing the environment up to date.
#
#   launch/quickstart.sh                                  a tiny mixture of experts on two ranks
#   launch/quickstart.sh run.steps=20 optimizer.lr=1e-3   with other settings (megatron-rl settings lists them)
#
# The reinforcement-learning loop is not there yet: this trains the Megatron-core policy on a supervised toy batch.
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
say "training the policy on a supervised toy batch over two ranks (the reinforcement-learning loop comes later)"
exec .venv/bin/megatron-rl train configs/quickstart.yaml "run.directory=$directory" "$@"
