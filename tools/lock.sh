#!/usr/bin/env bash
# Writes the lock files of launch/lock from pyproject.toml and the overrides beside them.
#
#   tools/lock.sh                          keep every locked version that still fits pyproject.toml
#   tools/lock.sh --upgrade                take the newest versions that fit
#   tools/lock.sh --upgrade-package NAME   the same for one package
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
cd "$root"

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    usage
    exit 0
fi
uv="$(bring_uv)"

# Names, versions and hashes, and nothing of the machine this runs on.
resolve() {
    "$uv" pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}

# sglang's wheels need glibc 2.34, which is what manylinux_2_34 says.
environment=(--python-version 3.12 --python-platform x86_64-manylinux_2_34 --extra dev pyproject.toml)

say "GPU (full)"
resolve "${environment[@]}" --extra gpu --override launch/lock/gpu.override --output-file launch/lock/gpu.lock "$@"
say "CPU (lean, at the versions of the GPU lock)"
resolve "${environment[@]}" --override launch/lock/cpu.override --constraint launch/lock/gpu.lock \
    --output-file launch/lock/cpu.lock "$@"
say "bootstrap (uv itself, for any Python that can install it)"
resolve --python-version 3.8 --universal --output-file launch/lock/bootstrap.lock "$@" - <<<"uv>=$OLDEST_UV"
say "done: $(grep -c == launch/lock/gpu.lock) packages for GPU, $(grep -c == launch/lock/cpu.lock) for CPU"
