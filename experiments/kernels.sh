#!/usr/bin/env bash
# Every operator variant on one GPU: first find launch configurations, then measure with them in a fresh process.
# Usage: experiments/kernels.sh [OUTPUT_ROOT]   (about 6 minutes on one H100; answer: docs/PERFORMANCE.md)
set -uo pipefail
root=${1:-outputs/kernels}
python=${PYTHON:-python3}
quick="repeats=5 min_time_s=0.02 peers=false tracking=none tune=true"
compile() { # the Triton kernels of a family at these shapes; Triton keeps them on disk
    $python -m grbench kernels families=[$1] variants=[triton] shapes=[$2] $quick \
        output_root=$root/compiled > $root/compile_$1_${2//[^a-z0-9]/}.log 2>&1 &
}
mkdir -p $root
# Compile for every configuration, all at once, whatever the clock then says...
compile hstu_attention "'4x128_*'"
compile hstu_attention "'4x256_b32*','4x256_b16*','4x256_b8_delta_3968+384'"
compile hstu_attention "'*page*'"
for family in norm_gate layer_norm interaction jagged_concat jagged_split token_embedding; do compile $family "'*'"; done
wait
# ... then find the fastest, one after another, and write this GPU's tables.
operators=[hstu_attention,norm_gate,layer_norm,interaction,jagged_concat,jagged_split,token_embedding]
$python -m grbench kernels families=$operators variants=[triton,cutlass] $quick output_root=$root/tuned || exit 1
$python -m grbench kernels variants=[torch,triton,cutlass,triton+graph,cutlass+graph] repeats=10 min_time_s=0.3 \
    output_root=$root
status=$?
# torch.compile takes long to compile: one shape of each kind.
$python -m grbench kernels families=[hstu_attention,norm_gate,interaction] variants=[torch,compile] peers=false \
    shapes=[4x128_b16_s1024,99328x512,16384x32x128] repeats=10 min_time_s=0.3 output_root=$root
exit $status
