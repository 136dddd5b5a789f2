#!/usr/bin/env bash
# Compiled engines against the native one on one GPU: every cell gated, engines in turns.
# Usage: experiments/gpu_compiled.sh [OUTPUT]   (about 5 minutes on one H100; what was measured is kept after each model)
set -uo pipefail
output=${1:-outputs/gpu_compiled}
python=${PYTHON:-python3}
$python experiments/compiled.py --output "$output" ${ONNX:+--onnx "$ONNX"}
