#!/usr/bin/env bash
# The native engine with the fastest kernels on one GPU: the cells of gpu_baseline.sh, at ten times the load.
# Usage: experiments/gpu_kernels.sh [OUTPUT_ROOT]   (about 2 minutes on one H100; answer: reports/gpu_kernels.md)
set -uo pipefail
root=${1:-outputs/gpu_kernels}
kernel=${KERNEL:-cutlass}
python=${PYTHON:-python3}
long="engine=hstu workload=synthetic_long engine.device=cuda engine.precision=bf16 kernel=$kernel runner.output_root=$root"
dlrm="model=dlrm_v3 $long scenario.max_batch=1 scenario.queries=1000"
wide="model=wide_heads $long workload.max_history=4096 workload.num_candidates=256 scenario.max_batch=8 scenario.queries=2000"
failed=0
$python -m grbench $dlrm scenario=offline || failed=1
$python -m grbench $wide scenario=offline || failed=1
$python -m grbench $wide scenario=server scenario.target_qps=200 || failed=1
$python -m grbench $dlrm scenario=server scenario.target_qps=100 || failed=1
exit $failed
