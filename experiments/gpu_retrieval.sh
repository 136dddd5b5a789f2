#!/usr/bin/env bash
# Retrieval on one GPU: by engine under load, with wide beams, for returning users, and HSTU against a Transformer.
# Usage: experiments/gpu_retrieval.sh [OUTPUT_ROOT]   (about 10 minutes on one H100; answer: reports/retrieval.md)
# KERNEL=triton experiments/gpu_retrieval.sh: where there are no CUTLASS kernels.
set -uo pipefail
root=${1:-outputs/gpu_retrieval}
run="${PYTHON:-python3} experiments/gpu_retrieval.py"
mkdir -p $root
failed=0
kernel="--kernel ${KERNEL:-cutlass}"
steps="[16,32,64,128,192,256,320,384,512,576,768,1024,1280,1536,2048,3072,4096,6144,8192]" # captured: prompts too
gates="gate.requests=2 engine.gpu_memory_utilization=0.5"
# A step of the last level of 8 searches with 256 beams has 4096 rows and what is left of 8 prompts.
$run wide --model decoder_1p7b --engines vllm --kernel torch --history 333 --beam 256 --batch 1 8 --rounds 6 \
    --set $gates engine.cuda_graphs=true "engine.graph_tokens=[320,576,1024,2432,4480]" 2> $root/wide.log | tee $root/wide.md || failed=1
$run returning $kernel --engines vllm --history 1024 4096 --beam 32 --rounds 8 --set $gates engine.cuda_graphs=true \
    "engine.graph_tokens=$steps" 2> $root/returning.log | tee $root/returning.md || failed=1
$run load $kernel --graphs --graph-tokens "$steps" --models hstu_0p2b decoder_0p2b --engines vllm --history 2730 --beams 32 \
    --batch 4 --set gate.requests=2 2> $root/transformer.log | tee $root/transformer.md || failed=1
$run load $kernel --graphs --graph-tokens "$steps" --engines hstu vllm hf --history 1024 4096 --beams 1 32 256 --batch 16 \
    --in-flight 2 --set gate.requests=2 2> $root/load.log | tee $root/load.md || failed=1
exit $failed
