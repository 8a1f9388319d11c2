#!/usr/bin/env bash
# Everything that is measured on one GPU of 80 GB, in one command:
#
#   bash benchmarks/gpu.sh [output_dir]
#
# The kernels against fp64 and their times, then steps beside their peers with profiles, calibration,
# and the deepest Llama of 8B's width that trains. Contenders are all in memory at once.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"

pytest tests/sparse/test_sddmm.py tests/sparse/test_sddmm_triton.py | tee "$out/kernels_against_fp64.txt"
python benchmarks/sddmm.py | tee "$out/sddmm.txt"

step() {
    python benchmarks/step.py --profile --dtype bf16 "${@:2}" --output_dir "$out/$1"
}
step opt-125m --shape opt-125m --rounds 40
step llama-3-1b --shape llama-3-1b --tokens 512
step llama-3-8b --shape llama-3-8b --tokens 512 --batch_size 2 --contenders floor gem lora

python benchmarks/calibration.py --dtype bf16 --shape llama-3-1b | tee "$out/calibration.txt"

# The deepest takes 58 GB of disk and of the host's memory; what ends the loop is printed above it.
for layers in 32 64 96 112 128; do
    step "depth_$layers" --shape llama-3-8b --layers $layers --contenders gem --rounds 1 \
        --gradient_checkpointing || { echo "$layers layers did not run"; break; }
done
