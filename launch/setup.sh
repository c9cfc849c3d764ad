#!/usr/bin/env bash
# Makes .venv: Python 3.12, exactly the packages of a lock file, and this project, editable.
#
#   launch/setup.sh          the kind of environment that .venv has now; CPU when there is none yet
#   launch/setup.sh --cpu    without Transformer Engine and GPU kernels
#   launch/setup.sh --gpu    with them; compiles one package against CUDA, which takes minutes
#
# Run it as often as you like: it changes only what is out of date, and says nothing more than that when nothing is. A new
# environment is built beside the old one and takes its place when it is whole, so a set-up that was interrupted or failed
# leaves what was there. What it needs and cannot find, uv and Python 3.12, it brings.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"

venv="$root/.venv"
partial="$root/.tools/venv.partial"
replaced="$root/.tools/venv.replaced"

main() {
    local kind=""
    while (($#)); do
        case "$1" in
            --cpu | --gpu) kind="${1#--}" ;;
            -h | --help) usage; return ;;
            *) fail "unknown option $1" "launch/setup.sh --help tells what there is." ;;
        esac
        shift
    done
    check_machine
    one_at_a_time

    [[ -n "$kind" ]] || kind="$(kind_of_venv)"
    local wanted_packages wanted_project
    wanted_packages="$kind $(checksum "launch/lock/$kind.lock")"
    wanted_project="$root $(checksum pyproject.toml)"
    if ! up_to_date packages "$wanted_packages" || ! "$venv/bin/python" -c '' 2>/dev/null; then
        build_environment "$kind" "$wanted_packages"
    fi
    if ! up_to_date project "$wanted_project"; then
        install_project "$wanted_project"
    fi
    say "ready: .venv ($kind)"
}

check_machine() {
    local machine
    machine="$(uname -sm)"
    [[ "$machine" == "Linux x86_64" ]] ||
        fail "the lock files are for Linux on x86_64, this is $machine" "Write locks for it: see tools/lock.sh."
}

# Two set-ups of one folder wait for each other.
one_at_a_time() {
    mkdir -p .tools
    exec 9>.tools/setup.guard
    if ! flock --nonblock 9; then
        say "another set-up of this folder is running: waiting for it"
        flock 9
    fi
}

kind_of_venv() {
    if [[ -e "$venv/.stamp-packages" ]]; then
        cut -d ' ' -f 1 "$venv/.stamp-packages"
        return
    fi
    [[ ! -e /dev/nvidiactl ]] || say "this machine has an NVIDIA GPU: launch/setup.sh --gpu makes the environment that uses it"
    echo cpu
}

checksum() { sha256sum "$1" | cut -d ' ' -f 1; }

# A stamp is written when its part is whole and holds what the part was made from.
up_to_date() { [[ "$(cat "$venv/.stamp-$1" 2>/dev/null)" == "$2" ]]; }

build_environment() {
    local kind="$1" stamp="$2" uv python
    uv="$(bring_uv)"
    python="$(bring_python "$uv")"
    say "a new .venv, with $python and $("$uv" --version)"
    rm -rf "$partial" "$replaced"
    # Relocatable: it is moved into place when it is whole.
    "$uv" venv --quiet --relocatable --no-project --python "$python" "$partial"
    say "installing $(grep -c == "launch/lock/$kind.lock") packages of launch/lock/$kind.lock (the first time, gigabytes are downloaded)"
    "install_$kind" "$uv" ||
        fail "the packages of launch/lock/$kind.lock could not be installed; what uv said stands above" \
            "Is there room on the disk ($(df -h --output=avail . | tail -n 1 | tr -d ' ') free here) and a way to a package index?" \
            "uv takes the address of a mirror from UV_DEFAULT_INDEX; pip's settings do not reach it." \
            "Nothing was changed: run this again when it is mended."
    say "checking that what is installed can be imported"
    check_imports "$kind"
    printf '%s\n' "$stamp" >"$partial/.stamp-packages"
    [[ ! -e "$venv" ]] || mv "$venv" "$replaced"
    mv "$partial" "$venv"
    rm -rf "$replaced"
}

# uv shows its progress to a terminal and is quiet elsewhere.
install_packages() {
    local uv="$1"
    shift
    local quiet=(--quiet)
    [[ ! -t 2 ]] || quiet=()
    "$uv" pip sync "${quiet[@]}" --python "$partial/bin/python" --require-hashes "$@"
}

install_cpu() {
    install_packages "$1" --only-binary :all: launch/lock/cpu.lock
}

# The torch part of Transformer Engine is published as source and compiles against the torch, the compiler and the headers that
# the lock brings, so these come first. FORCE_BUILD: it would else fetch a binary that no lock has a hash of.
install_gpu() {
    local uv="$1" source=transformer-engine-torch others=.tools/gpu-others.lock cuda
    without_package "$source" <launch/lock/gpu.lock >"$others"
    install_packages "$uv" --only-binary :all: "$others" || return
    cuda="$("$partial/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13"
    say "compiling $source, unless uv has it in its cache (a quarter of an hour on one core)"
    CUDA_HOME="$cuda" CPATH="$cuda/include/cccl" NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
        install_packages "$uv" --no-build-isolation launch/lock/gpu.lock
}

# Drops one package and the hash lines that follow it.
without_package() {
    awk -v name="$1" '/^[^ ]/ {drop = index($0, name "==") == 1} !drop'
}

check_imports() {
    local modules="torch, megatron.core, sglang, transformers, datasets, pydantic" report
    [[ "$1" == cpu ]] || modules+=", transformer_engine.pytorch"
    report="$("$partial/bin/python" -W ignore -c "import $modules" 2>&1)" ||
        fail "what is installed cannot be imported" "$(tail -n 3 <<<"$report")" \
            "Has this machine a C++ runtime (Debian: libstdc++6, libgomp1)? Nothing was changed."
}

install_project() {
    local uv
    uv="$(bring_uv)"
    say "installing this project into it, editable"
    rm -f "$venv/.stamp-project"
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable . ||
        fail "the project could not be installed; what uv said stands above" "Mend pyproject.toml, and run this again."
    (cd / && "$venv/bin/python" -c "import megatron_rl") ||
        fail "megatron_rl cannot be imported; what Python said stands above" "Mend it, and run this again."
    printf '%s\n' "$1" >"$venv/.stamp-project"
}

main "$@"
