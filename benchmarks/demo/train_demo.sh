#!/bin/sh
# Trains flowad_fast/assets/demo.safetensors from nothing: good monocrystalline solar cells (ELPV), Lite0 features.
# Needs: pip install "flowad-fast[demo]". About 20 minutes on two CPU cores. Interrupted, it goes on when run again.
# Usage: benchmarks/demo/train_demo.sh [FOLDER]    (default runs/demo; the state and 650 MB of features stay there)
set -eu

out="${1:-runs/demo}"
assets="$(dirname "$0")/../../flowad_fast/assets"

flowad-train \
    --output "$out" \
    --layout elpv --category mono \
    --backbone efficientnet-lite0 --image-size 256 --normalise-features \
    --hidden-size 256 --depth 4 --num-heads 4 \
    --batch-size 8 --steps 2400 --lr 4e-4 --min-lr 4e-6 --warmup-steps 100 --weight-decay 0.01 \
    --ema-decay 0.999 --grad-clip 1.0 --flips both --precision fp32 --seed 0 \
    --feature-cache "$out/features" --log-every 50 --save-every 200 --dtype float16 --device cpu

cp "$out/model.safetensors" "$assets/demo.safetensors"
cp "$out/model.json" "$assets/demo.json"
