#!/usr/bin/env bash
# The native engine with eager PyTorch kernels on one GPU: what every other kernel and engine must beat.
# Usage: experiments/gpu_baseline.sh [OUTPUT_ROOT]   (about 6 minutes on one H100; answer: reports/gpu_baseline.md)
set -uo pipefail
root=${1:-outputs/gpu_baseline}
python=${PYTHON:-python3}
long="engine=hstu workload=synthetic_long engine.device=cuda engine.precision=bf16 kernel=torch runner.output_root=$root"
# One request a batch: eager attention pads a batch to its longest sequence, which at these lengths costs more
# than batching gains.
dlrm="model=dlrm_v3 $long scenario.max_batch=1 scenario.queries=1000"
wide="model=wide_heads $long workload.max_history=4096 workload.num_candidates=256 scenario.max_batch=8 scenario.queries=2000"
failed=0
$python -m grbench $dlrm scenario=offline || failed=1
$python -m grbench $dlrm scenario=server scenario.target_qps=10 || failed=1
$python -m grbench $wide scenario=offline || failed=1
$python -m grbench $wide scenario=server scenario.target_qps=40 || failed=1
exit $failed
