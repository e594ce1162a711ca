#!/usr/bin/env bash
# The chest X-ray variant of NVAE (Vahdat and Kautz 2020): the published MNIST command with --dataset covid.
# Trains on the class Normal of the COVID-19 Radiography Database. No anomaly score, AUROC or split was published with
# it, so there is no number to compare with; the split and the scores are this framework's.
# Published cost of the same network on MNIST: 2 V100 GPUs for 21 hours. Without GPUs it starts as two CPU processes.
# Here the X-rays are gray levels at 64 x 64 under a mixture of logistics; the published variant made them binary
# (--likelihood bernoulli).
#
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/nvae_chest_xray_published.sh     from any folder
#   ... nvae_chest_xray_published.sh --cont_training                                   goes on where it stopped
#   python evaluate.py --checkpoint runs/eval-nvae_chest_xray/checkpoint.pt --eval_mode anomaly
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset covid --data "${DATA:-}" --root "$ROOT" --save nvae_chest_xray \
    --batch_size 200 --epochs 400 --fast_adamax --weight_decay_norm 1e-2 \
    --num_latent_scales 2 --num_groups_per_scale 10 --ada_groups --num_latent_per_group 20 --num_nf 0 \
    --num_channels_enc 32 --num_preprocess_blocks 2 --num_preprocess_cells 3 --num_cell_per_cond_enc 2 \
    --num_channels_dec 32 --num_postprocess_blocks 2 --num_postprocess_cells 3 --num_cell_per_cond_dec 2 \
    --use_se --res_dist --num_process_per_node 2 "$@"
