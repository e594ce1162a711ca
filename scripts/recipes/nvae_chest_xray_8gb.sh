#!/usr/bin/env bash
# NVAE on chest X-rays at 64 x 64, for a GPU of 8 GB.
# 15.3 M parameters, 12 groups. --dry_run estimates 6.1 GB in float32 for batches of 32; bfloat16, the default on
# GPUs, keeps less. Sized by that estimate, not yet trained on such a GPU: no result to compare with.
#
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/nvae_chest_xray_8gb.sh
#   ... nvae_chest_xray_8gb.sh --dry_run                 parameters, memory, speed, time, also without DATA; leaves nothing
#   ... nvae_chest_xray_8gb.sh --cont_training           goes on where it stopped
#
# DATA is the folder that holds Normal and COVID, ROOT the folder of runs.
# Afterwards: python evaluate.py --checkpoint runs/eval-nvae_chest_xray_8gb/checkpoint.pt --eval_mode anomaly
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset covid --data "${DATA:-}" --root "$ROOT" --save nvae_chest_xray_8gb \
    --image_size 64 --batch_size 32 --epochs 400 --learning_rate 2e-3 --grad_clip 200 --ema_decay 0.999 \
    --ema_bn_batches 20 --weight_decay_norm 1e-2 --fast_adamax --use_se --res_dist \
    --num_latent_scales 2 --num_groups_per_scale 8 --ada_groups --min_groups_per_scale 1 \
    --num_latent_per_group 20 --num_channels_enc 32 --num_channels_dec 32 \
    --num_preprocess_blocks 2 --num_preprocess_cells 2 --num_cell_per_cond_enc 1 \
    --num_postprocess_blocks 2 --num_postprocess_cells 2 --num_cell_per_cond_dec 1 "$@"
