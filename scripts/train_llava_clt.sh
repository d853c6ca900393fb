#!/usr/bin/env bash
# bash scripts/train_llava_clt.sh MODEL NAME ACTIVATIONS_DIR [flags of train_llava_transcoder_layer.py]
# One transcoder per L<layer>/ folder of ACTIVATIONS_DIR, into transcoders/NAME. A joint CLT (`clt train`) is better.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n 2,3p "$0" >&2; exit 2; fi
model=$1 name=$2 activations=$3
shift 3
config=$(mktemp)
trap 'rm -f "$config"' EXIT
printf 'model: "%s"\noutputs:\n  activations_dir: "%s"\n  transcoders_dir: "transcoders/%s"\n  logs_dir: "logs/%s"\n' \
  "$model" "$activations" "$name" "$name" > "$config"
layers=$(find -L "$activations" -maxdepth 1 -type d -name 'L[0-9]*' | sed 's|.*/L||' | sort -n)
if [ -z "$layers" ]; then echo "$activations holds no L0, L1, ... folders" >&2; exit 2; fi
for layer in $layers; do
  "${PYTHON:-python}" "$(dirname "$0")/train_llava_transcoder_layer.py" --config "$config" --layer "$layer" "$@"
done
