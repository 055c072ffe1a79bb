#!/usr/bin/env bash
# Sets up on first use, then checks style, types and floors, and runs the tests.
#
#   ./run_tests.sh             everything but the slow sweeps, under 15 minutes on 2 cores
#   ./run_tests.sh --all       the slow sweeps too, and new random examples
#   ./run_tests.sh tests/unit  anything else is passed on to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup.sh
setup dev

selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=(--hypothesis-profile explore)
    shift
fi
# On all cores, shared out by tests/conftest.py; on one where the caller chooses the tests.
workers=(--numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do
    [ "${argument:0:1}" = - ] || workers=()
done
bin=.venv/bin
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/lint-imports
exec $bin/python -m pytest "${selection[@]}" ${workers[@]+"${workers[@]}"} "$@"
