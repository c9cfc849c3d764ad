# shellcheck shell=bash
# Shared by the scripts of launch/ and tools/, which source it: messages, and where uv and Python 3.12 are found.
# Everything is looked for below $root, the repository.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# A caller's Python settings do not concern the project's environment. Without bytecode an SGLang server starts three times slower.
unset PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH VIRTUAL_ENV CONDA_PREFIX

# A certificate authority of one's own, a company's proxy say, stands in the system's store, where uv looks only when told to.
if [[ -e /etc/ssl/certs/ca-certificates.crt || -e /etc/pki/tls/certs/ca-bundle.crt ]]; then
    export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"
fi

OLDEST_UV=0.11.0

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }

# fail WHAT-WENT-WRONG WHAT-TO-DO...
fail() {
    say "failed: $1"
    shift
    printf '    %s\n' "$@" >&2
    exit 1
}

# Prints the comment at the top of the script that runs.
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "$0"; }

# Every Python interpreter that may be on this machine, best guesses first; a path may be missing or a shim that does not run.
python_candidates() {
    local name
    for name in python3.12 python3 python; do
        type -aP "$name" || true
    done
    compgen -G "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.*/bin/python3" | sort -rV || true
    compgen -G "${HOME:-}/.pyenv/versions/3.*/bin/python3" | sort -rV || true
}

# Python 3.12 with the parts of the standard library that some builds lack.
is_python_3_12() {
    "$1" -c 'import sys, bz2, ctypes, lzma, sqlite3, ssl; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

is_uv() {
    local version
    version="$("$1" --version 2>/dev/null | awk '{print $2}')" && [[ -n "$version" ]] &&
        [[ "$(printf '%s\n' "$OLDEST_UV" "$version" | sort -V | head -n 1)" == "$OLDEST_UV" ]]
}

# Prints the path of a uv that runs: the one on PATH, or one of the project's own, installed by the first Python that can.
bring_uv() {
    local own="$root/.tools/uv/bin/uv" uv python tried=()
    for uv in "$(type -P uv || true)" "$own"; do
        if [[ -n "$uv" ]] && is_uv "$uv"; then
            printf '%s\n' "$uv"
            return
        fi
    done
    mkdir -p "$root/.tools"
    while read -r python; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 || continue
        say "uv is missing: installing it below .tools/ with $python"
        if install_uv "$python" >"$root/.tools/uv.log" 2>&1 && is_uv "$own"; then
            printf '%s\n' "$own"
            return
        fi
        tried+=("$python: $(grep -v '^$' "$root/.tools/uv.log" | tail -n 1)")
    done < <(python_candidates)
    fail "uv is missing, and no Python here could install it" "${tried[@]:-no Python 3.8 or newer was found}" \
        "Install uv by your usual means, or pip for a Python (Debian: apt-get install python3-pip), and run this again."
}

# Into a folder of its own, moved into place when whole. Needs that Python's pip or its venv, and no rights to it.
install_uv() {
    local pip=("$1" -m pip) partial="$root/.tools/uv.partial"
    rm -rf "$partial" "$root/.tools/uv"
    if ! "${pip[@]}" --version; then
        "$1" -m venv --clear "$root/.tools/pip" || return
        pip=("$root/.tools/pip/bin/python" -m pip)
    fi
    "${pip[@]}" install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
        --requirement "$root/launch/lock/bootstrap.lock" --target "$partial" &&
        mv "$partial" "$root/.tools/uv"
}

# bring_python UV: prints the path of a Python 3.12 that runs; obtains one through uv when there is none.
bring_python() {
    local uv="$1" python
    while read -r python; do
        if is_python_3_12 "$python"; then
            printf '%s\n' "$python"
            return
        fi
    done < <(python_candidates; "$uv" python find --no-project --system 3.12 2>/dev/null || true)
    say "Python 3.12 is not on this machine: obtaining it through uv"
    "$uv" python install 3.12 >&2 ||
        fail "Python 3.12 could not be obtained; what uv said stands above" \
            "Install it by your usual means (your distribution's python3.12, pyenv install 3.12) so that python3.12 is on PATH, and run this again."
    python="$("$uv" python find --no-project --system 3.12)"
    is_python_3_12 "$python" || fail "$python does not run as Python 3.12" "Install Python 3.12 by other means, and run this again."
    printf '%s\n' "$python"
}

# bring_packages WHAT PACKAGES...: what tests need of the system, by apt where it is there and this user may. Tests that need it
# fail without it, and say so.
bring_packages() {
    local what="$1" log="$root/.tools/apt.log"
    shift
    if ((EUID)) || ! type -P apt-get >/dev/null; then
        say "$what is not installed (Debian: $*), and this user cannot install it: the tests that need it will fail"
        return
    fi
    say "installing $what"
    mkdir -p "$root/.tools"
    install_packages_of_system "$@" >"$log" 2>&1 || say "$* could not be installed ($log): the tests that need it will fail"
}

install_packages_of_system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install --yes --no-install-recommends "$@" || {
        apt-get update && apt-get install --yes --no-install-recommends "$@"
    }
}

# Its daemons are started by tests alone, with a configuration of their own.
bring_slurm() {
    local name
    for name in slurmctld slurmd sbatch munged; do
        PATH="$PATH:/usr/sbin" type -P "$name" >/dev/null || {
            bring_packages "SLURM, for the tests of launching" slurm-wlm munge
            return
        }
    done
}

bring_shellcheck() {
    type -P shellcheck >/dev/null || bring_packages "shellcheck, for the tests of the scripts" shellcheck
}
