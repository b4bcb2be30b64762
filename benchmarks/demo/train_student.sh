#!/bin/sh
# Trains a student of the shipped checkpoint demo for one evaluation of mismatch: 31 % of its operations. Needs:
# pip install "flowad-fast[demo]". About 65 minutes on one busy CPU core; interrupted, it goes on when run again. What
# came of it is benchmarks/results/demo/student.json, its loss curve training-student.jsonl beside it.
# Usage: benchmarks/demo/train_student.sh [FOLDER]    (default runs/student)
set -eu

out="${1:-runs/student}"

flowad-train \
    --output "$out" --teacher demo --layout elpv --category mono \
    --hidden-size 192 --depth 2 --num-heads 4 \
    --batch-size 8 --steps 8000 --lr 1e-3 --min-lr 1e-5 --warmup-steps 100 --ema-decay 0.999 --flips both \
    --feature-cache "$out/features" --log-every 100 --save-every 200 --dtype float16 --device cpu

# Its speed beside its teacher's, in one run:
# flowad-bench fewer --preset "$out/model.safetensors" --teacher demo
