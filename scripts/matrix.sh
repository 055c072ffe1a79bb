#!/usr/bin/env bash
# Tests the package with several versions of torch, each in a new environment, and prints a table.
#
#   scripts/matrix.sh              torch 2.11, 2.12, 2.13 and 2.14
#   scripts/matrix.sh 2.12 2.14.1  these versions only
#
# Runs the unit, golden, stock and resharding tests. PYTHON is the interpreter (default: python3).
# Environments and logs are in .matrix/. An environment takes up to 7 GB, so it is deleted when its
# tests end, unless KEEP=1. Ends with status 1 if any version failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || set -- 2.11 2.12 2.13 2.14
tests=(tests/unit tests/golden tests/interop/test_stock.py
    tests/distributed/test_resharding.py tests/property/test_property_reshard.py)
unset PYTHONDONTWRITEBYTECODE
failed=0
rows=()

# Installs torch $1 and the package into .matrix/$1; pip writes to .matrix/$1.log.
make_environment() {
    local wanted=$1
    [ "${wanted//[^.]/}" = .. ] || wanted+=.* # 2.12 means any 2.12
    rm -rf ".matrix/$1"
    "${PYTHON:-python3}" -m venv ".matrix/$1" &&
        ".matrix/$1/bin/python" -m pip install --disable-pip-version-check \
            "torch==$wanted" -e ".[dev]" >".matrix/$1.log" 2>&1
}

mkdir -p .matrix
for version in "$@"; do
    started=$SECONDS
    echo "torch $version: installing; log: .matrix/$version.log" >&2
    if ! make_environment "$version"; then
        tail -n 5 ".matrix/$version.log" >&2
        rows+=("| $version | | installation failed | $((SECONDS - started)) |")
        failed=1
        continue
    fi
    bin=.matrix/$version/bin
    found=$("$bin/python" -c 'import platform, torch; print(torch.__version__, "|", platform.python_version())')
    echo "torch $version: testing torch $found" >&2
    # `python` in tests is the one of this environment.
    PATH="$PWD/$bin:$PATH" "$bin/python" -m pytest -m "not slow" -q -p no:cacheprovider \
        --numprocesses $(($(nproc) + 1)) --dist loadfile "${tests[@]}" >>".matrix/$version.log" 2>&1 || {
        failed=1
        grep -E '^(FAILED|ERROR) ' ".matrix/$version.log" >&2
    }
    result=$(tail -n 1 ".matrix/$version.log" | sed -E 's/^=* ?//; s/ in [0-9.]+s.*//')
    echo "torch $version: $result" >&2
    rows+=("| $found | $result | $((SECONDS - started)) |")
    [ -n "${KEEP:-}" ] || rm -rf ".matrix/$version"
done

echo "| torch | Python | tests | seconds with installation |"
echo "|---|---|---|---|"
printf '%s\n' "${rows[@]}"
exit "$failed"
