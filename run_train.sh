#!/usr/bin/env bash
# Installs on first use, then trains. A second run resumes from the newest checkpoint.
#
#   ./run_train.sh                                 train the debug model on all GPUs
#   NGPU=4 ./run_train.sh --training.steps 200     set any setting as `--section.key value`
#   ./run_train.sh --help                          list every setting, its meaning and its default
#
#   NGPU          number of workers (default: number of GPUs, else 2 on the CPU)
#   CONFIG_FILE   TOML file (default: train_configs/debug_model.toml)
#   LOG_RANK      ranks that log, comma-separated (default: 0)
#
# Several machines: torchrun ... -m holdfast.trainer --job.config_file FILE
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/setup.sh"
setup ""

export LOG_RANK=${LOG_RANK:-0}
config_file=${CONFIG_FILE:-train_configs/debug_model.toml}
# Find a relative path below the current directory first, then below the project.
if [ ! -e "$config_file" ] && [ -e "$root/$config_file" ]; then
    config_file=$root/$config_file
fi
exec "$root/.venv/bin/python" -m holdfast.trainer.launch --job.config_file "$config_file" "$@"
