#!/usr/bin/env bash
# What the user-state cache changes on one GPU: hits one by one, then p99 and goodput under load as users return.
# Usage: experiments/gpu_cache.sh [OUTPUT_ROOT]   (about 10 minutes on one GPU; answer: reports/user_cache.md)
set -uo pipefail
root=${1:-outputs/gpu_cache}
python=${PYTHON:-python3}
mkdir -p $root
failed=0
$python experiments/user_cache.py --output $root/user_cache.json | tee $root/user_cache.txt || failed=1
users="workload=synthetic_long workload.users=2000 workload.history_median=3000 workload.history_sigma=0.3 workload.max_history=8192"
load="scenario.max_batch=8 scenario.queries=2000 workload.num_candidates=256"
engine="engine=hstu model=wide_heads kernel=cutlass engine.device=cuda engine.precision=bf16 engine.cuda_graphs=true"
graphs="engine.graph_lengths=[320,384,512,3072,4096,6144]"
cache="cache=lru cache.memory_gb=12 cache.host_gb=16"
run="$python -m grbench -m runner.output_root=$root $users $load $engine $graphs"
server="$run scenario=server scenario.target_qps=400"
$server workload.revisit_rate=0,0.6 cache=none || failed=1
$server workload.revisit_rate=0,0.6,0.9 $cache || failed=1
$run scenario=offline scenario.in_flight=1,2 workload.revisit_rate=0.9 $cache || failed=1
${run/queries=2000/queries=3000} scenario=offline scenario.in_flight=1,2 cache=none || failed=1
$server workload.revisit_rate=0,0.6 $cache cache.admit_visit=1 cache.host_admit_visit=1 || failed=1
$python experiments/item_cache.py --device cuda --rows 2000000 | tee $root/item_cache.txt || failed=1
exit $failed
