#!/usr/bin/env bash
# What is worth measuring on one GPU, the most valuable first:
#
#   bash benchmarks/gpu.sh [OUTPUT_DIR [SECTION ...]]      # default: runs/gpu, all sections
#   DRY_RUN=1 bash benchmarks/gpu.sh ...                   # tiny shapes, on a CPU too
#
# A section is one command of less than three minutes that is worth having alone: it is stopped after
# LIMIT seconds (170), what it printed lies in OUTPUT_DIR/SECTION.txt, and one that fails leaves the
# others alone. The exit status is 1 if one did. Models are made on the GPU, none is loaded or
# fetched; of 80 GB the 8B shape needs 60. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
wanted=" ${*:2} "
python=${PYTHON:-python}
limit=${LIMIT:-170}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=default
failed=0

# Of two same flags the last one holds.
small_step=() small_kernels=() small_calibration=() small_demo=() small_tests=()
if [[ -n ${DRY_RUN:-} ]]; then
    small_calibration=(--shape tiny --batches 1 --batch_size 1 --tokens 16 --rounds 1)
    small_step=(--shape tiny --tokens 16 --rounds 0 --contenders gem)
    small_kernels=(--shapes 64x48 --tokens 32 --densities 0.01 --rounds 1)
    small_demo=(--train_examples 64 --calibration_examples 32 --max_eval_samples 8 --max_steps 1)
    small_tests=(-k low_precision)
fi

section() { # NAME COMMAND ...
    local name=$1 started=$SECONDS status
    shift
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    if ((status == 0)); then
        printf '%-12s done in %d s: %s\n' "$name" $((SECONDS - started)) "$out/$name.txt"
    else
        failed=1
        printf '%-12s FAILED with status %d after %d s: %s\n' "$name" $status \
            $((SECONDS - started)) "$out/$name.txt"
        tail -n 5 "$out/$name.txt" | sed 's/^/    /'
    fi
}

step() { # NAME FLAGS ...
    section "$1" "$python" benchmarks/step.py --makes_weights --dtype bf16 --profile --rounds 10 \
        --steps 2 --output_dir "$out/$1" "${@:2}" ${small_step[@]+"${small_step[@]}"}
}

# The kernels of the sampled gradient: errors against fp64, seconds, bytes. What `auto` should take.
section kernels "$python" benchmarks/sddmm.py --shapes 4096x4096 14336x4096 1024x4096 --tokens 4096 \
    --densities 0.001 0.003 0.01 0.1 --dtypes bf16 ${small_kernels[@]+"${small_kernels[@]}"}

# A step beside its peers, with a profile of each; then at ZeRO 3 with recomputed activations.
step llama-3-1b --shape llama-3-1b --tokens 512 --contenders floor gem lora
step llama-3-8b --shape llama-3-8b --tokens 512 --batch_size 2 --contenders floor gem lora
step zero3 --shape llama-3-1b --tokens 512 --stage 3 --gradient_checkpointing \
    --contenders floor gem lora lora_default

# A whole run of the embedded model, from its calibration to its answers; the loss must fall.
section demo "$python" launch/train.py --config launch/recipes/demo.yaml --bf16 --disable_tqdm \
    --output_dir "$out/demo" --overwrite_output_dir ${small_demo[@]+"${small_demo[@]}"}

# A real language model on real text, where `make demo-real` has left both.
if [[ -d runs/smollm2-135m && -d runs/movie_reviews ]]; then
    section real "$python" launch/train.py --config launch/recipes/smollm2_reviews.yaml --bf16 \
        --disable_tqdm --output_dir "$out/real" --overwrite_output_dir \
        ${small_demo[@]+"${small_demo[@]}"}
fi

section calibration "$python" benchmarks/calibration.py --makes_weights --dtype bf16 \
    --shape llama-3-1b ${small_calibration[@]+"${small_calibration[@]}"}

# Every case of the kernels' tests.
section tests "$python" -m pytest -p no:cacheprovider -W default tests/sparse/test_sddmm.py \
    ${small_tests[@]+"${small_tests[@]}"}
exit $failed
