#!/usr/bin/env bash
# The main job on synthetic radiographs, on a laptop: make the phantom data set, train a small NVAE on its normal
# class, score the test images. Runs again from where it stopped.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset phantom --root "$ROOT" --save demo --cont_training \
    --batch_size 16 --epochs 10 --warmup_epochs 1 --learning_rate 5e-3 --fast_adamax \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 1 --num_groups_per_scale 3 --num_latent_per_group 4 \
    --num_channels_enc 8 --num_preprocess_blocks 3 --num_preprocess_cells 1 \
    --num_channels_dec 8 --num_postprocess_blocks 3 --num_postprocess_cells 1 --num_mixture_dec 3 \
    --val_every 5 --val_iw_samples 2 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-demo/checkpoint.pt" --eval_mode anomaly \
    --save "$ROOT/eval-demo/anomaly" --num_draws 1 --num_iw_samples 4 --batch_size 50
