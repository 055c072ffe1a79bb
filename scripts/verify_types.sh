#!/usr/bin/env bash
# Asks pyright whether the whole public API is annotated: status 1 if it is not.
#
#   pip install pyright
#   scripts/verify_types.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# pyright finds packages by the `python` on PATH; `--verifytypes` ignores its other options for that.
PATH="$PWD/.venv/bin:$PATH" exec pyright --verifytypes holdfast --ignoreexternal "$@"
