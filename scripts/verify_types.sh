#!/usr/bin/env bash
# Checks by pyright that the whole public API is annotated; ends with status 1 if it is not.
#
#   pip install pyright
#   scripts/verify_types.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Sets PATH, since `pyright --verifytypes` finds packages only by the `python` there.
PATH="$PWD/.venv/bin:$PATH" exec pyright --verifytypes holdfast --ignoreexternal "$@"
