#!/usr/bin/env bash
# HVAE on chest X-rays for a machine without a GPU: trained on the Normal class of the COVID-19 Radiography Database, scored
# against every other class. Four stages at 32, 16, 8 and 8 pixels.
#
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/hvae_chest_xray_cpu.sh
#   MODEL=lvae ...                                                       the same network as a ladder, or MODEL=biva
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MODEL=${MODEL:-hvae}
SAVE=${MODEL}_chest_cpu

block() { echo "{\"block\": \"ResBlockConv2d\", \"out_channels\": 32, \"kernel_size\": $1, \"stride\": $2, \"gated\": false}"; }
"$PYTHON" "$REPOSITORY/train.py" --model "$MODEL" --dataset covid --data "${DATA:-}" --root "$ROOT" --save "$SAVE" \
    --config_deterministic "[[$(block 5 2), $(block 3 1)], [$(block 3 2), $(block 3 1)], [$(block 3 2), $(block 3 1)], [$(block 3 1)]]" \
    --config_stochastic '[{"block": "GaussianConv2d", "latent_features": 8}, {"block": "GaussianConv2d", "latent_features": 8},
        {"block": "GaussianConv2d", "latent_features": 8}, {"block": "GaussianDense", "latent_features": 16}]' \
    --batch_size 32 --epochs 100 --optimizer adam --learning_rate 1e-3 --learning_rate_min 1e-4 --warmup_epochs 0 \
    --weight_decay 0 --free_nats 0 --kl_anneal_portion 0.3 --val_every 20 --val_iw_samples 1 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$SAVE/checkpoint.pt" --eval_mode anomaly \
    --num_draws 4 --num_iw_samples 8
