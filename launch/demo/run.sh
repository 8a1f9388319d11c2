#!/usr/bin/env bash
# The whole job on the embedded model: exact match before, fine-tuning on two ranks under ZeRO-3,
# exact match after; then pass@1 and pass@10 on small programs, which the base model can write.
# Run it from anywhere: bash launch/demo/run.sh (or: make demo).
set -euo pipefail
cd "$(dirname "$0")/../.."

MODEL=launch/demo/model
DATA=launch/demo/task
OUT=runs/demo
export DS_ACCELERATOR=cpu # so small a model needs no GPU, and two ranks would need two
export CUDA_VISIBLE_DEVICES=""
export OMP_NUM_THREADS=1 # two ranks on two cores

echo "== 1/4  exact match of the base model on the held-out problems"
python -m eval.gsm8k --model_name_or_path $MODEL --data_dir $DATA --output_dir $OUT/before \
    --max_new_tokens 48 --dtype float32 --overwrite_output_dir

echo "== 2/4  fine-tuning with GEM: two ranks, ZeRO stage 3"
deepspeed --quiet --num_accelerators 2 launch/train.py --config launch/recipes/demo.yaml \
    --deepspeed ds_configs/zero3.json --output_dir $OUT/train --overwrite_output_dir

echo "== 3/4  exact match after fine-tuning"
python -m eval.gsm8k --model_name_or_path $MODEL --delta $OUT/train/delta.safetensors \
    --data_dir $DATA --output_dir $OUT/after --max_new_tokens 48 --dtype float32 --overwrite_output_dir

# The embedded model writes sums and products of one number: where the host allows no namespaces, as
# in many containers, a weaker sandbox will do for these programs (and it says that it is one).
echo "== 4/4  pass@k of the base model: its programs are run in a sandbox"
python -m eval.passk --model_name_or_path $MODEL --data_dir launch/demo/programs \
    --prompt_template '{header}' --output_dir $OUT/programs --max_new_tokens 48 --dtype float32 \
    --overwrite_output_dir --allow-weak-sandbox

python -m launch.demo.compare $OUT/before $OUT/after
