#!/usr/bin/env bash
# Asks pyright whether the whole public API is annotated: status 1 if it is not.
#
#   pip install pyright
#   scripts/verify_types.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec pyright --pythonpath "${PYTHON:-.venv/bin/python}" --verifytypes holdfast --ignoreexternal
