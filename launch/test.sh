#!/usr/bin/env bash
# Checks the project, after bringing the environment up to date.
#
#   launch/test.sh                         style, types, every test
#   launch/test.sh tests/config -k include only these tests: what you give goes to pytest as it is
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$root"

# The report's page is tested in a real browser. Without one its tests fail, and say so.
bring_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        ! type -P "$name" >/dev/null || return 0
    done
    bring_packages "a browser, for the tests of the report's page" chromium
}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    usage
    exit 0
fi
launch/setup.sh
bring_browser
bring_slurm
bring_shellcheck
if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi

# Tests that mostly wait, for servers and for runs as users start them, go on beside those that compute. Each lane takes a thread.
live=(tests/rollout tests/faults tests/train tests/weights/publish tests/slurm tests/fidelity tests/doctor/test_doctor.py)
both_lanes() {
    local log=.tools/live-tests.log result=0 other=0 pid
    mkdir -p .tools
    OMP_NUM_THREADS=1 .venv/bin/python -m pytest "${live[@]}" >"$log" 2>&1 &
    pid=$!
    OMP_NUM_THREADS=1 .venv/bin/python -m pytest "${live[@]/#/--ignore=}" || result=$?
    say "tests that ran beside these: ${live[*]}"
    wait "$pid" || other=$?
    cat "$log"
    return $((result > other ? result : other))
}

# Every check runs, whatever the one before it found; pytest last, so that its summary closes the output.
failed=()
check() {
    local name="$1"
    shift
    say "$name"
    "$@" || failed+=("$name")
}
check "style (ruff check)" .venv/bin/ruff check .
check "format (ruff format)" .venv/bin/ruff format --check --quiet .
check "types (mypy)" .venv/bin/mypy
check "tests (pytest)" both_lanes
if ((${#failed[@]})); then
    fail "$(IFS=,; printf '%s' "${failed[*]}")" "What they said stands above. .venv/bin/ruff check --fix . and .venv/bin/ruff format . mend most of the style."
fi
