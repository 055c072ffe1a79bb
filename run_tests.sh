#!/usr/bin/env bash
# Installs on first use, then checks style, types and layers, and runs the tests.
#
#   ./run_tests.sh             all tests except slow ones, 10 minutes on 2 cores
#   ./run_tests.sh --fast      checks, and the tests that start no process: about 80 seconds
#   ./run_tests.sh --all       slow tests too, with new random examples; every command starts afresh
#   ./run_tests.sh tests/unit  other arguments are passed on to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup.sh
setup dev

selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=(--hypothesis-profile explore)
    export HOLDFAST_TESTS_COLD=1
    shift
fi
# One process more than cores, since tests wait for processes and disks, which those of --fast do
# not; tests/conftest.py divides the tests. One process if the caller chooses the tests.
count=$(($(nproc) + 1))
[ "${1:-}" != --fast ] || count=$(nproc)
workers=(--numprocesses "$count" --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do
    [ "${argument:0:1}" = - ] || workers=()
done
# Tests start many processes, and each would compile the sources again.
unset PYTHONDONTWRITEBYTECODE
bin=.venv/bin
$bin/ruff check .
$bin/ruff format --check .
# Layers and types are checked while the tests run. What these checks say comes last.
check() {
    local status=0
    $bin/lint-imports || status=$?
    $bin/mypy || status=$?
    return "$status"
}
said=$(mktemp)
check >"$said" 2>&1 &
checks=$!
trap 'kill "$checks" 2>/dev/null || true; rm -f "$said"' EXIT
status=0
$bin/python -m pytest "${selection[@]}" ${workers[@]+"${workers[@]}"} "$@" || status=$?
wait "$checks" || status=$?
cat "$said"
exit "$status"
