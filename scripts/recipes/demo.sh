#!/usr/bin/env bash
# The main job on synthetic radiographs, on a laptop: make the phantom data set, train a small NVAE on its normal class,
# score the test images. Runs again from where it stopped.
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
ROOT=${ROOT:-runs}

"$PYTHON" "$REPOSITORY/train.py" --dataset phantom --root "$ROOT" --save demo --cont_training \
    --batch_size 16 --epochs 8 --warmup_epochs 1 --learning_rate 1e-2 --val_iw_samples 2 --fast_adamax \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 \
    --num_latent_scales 2 --num_groups_per_scale 4 --ada_groups --num_latent_per_group 8 \
    --num_channels_enc 16 --num_preprocess_blocks 1 --num_preprocess_cells 2 \
    --num_channels_dec 16 --num_postprocess_blocks 1 --num_postprocess_cells 2 --num_mixture_dec 5 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-demo/checkpoint.pt" --eval_mode anomaly --save "$ROOT/eval-demo/anomaly" \
    --num_draws 1 --num_iw_samples 4 --batch_size 50
