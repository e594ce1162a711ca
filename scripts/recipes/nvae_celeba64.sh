#!/usr/bin/env bash
# NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz 2020), CelebA at 64 x 64.
# Published: 2.03 bits per dimension (with flows); 153.28 M parameters, 35 groups; 8 V100 for 92 hours.
#
#   DATA=path/to/celeba64_lmdb bash scripts/recipes/nvae_celeba64.sh
#   ... nvae_celeba64.sh --dry_run                 parameters, memory, speed, time, also without DATA; leaves nothing
#   ... nvae_celeba64.sh --cont_training           goes on where it stopped
#   ... nvae_celeba64.sh --num_process_per_node 1 --accumulate 8       one GPU, the same joint batch
#
# DATA is the folder that holds train.lmdb and validation.lmdb (scripts/create_celeba64_lmdb.py), ROOT the folder of runs.
# The published evaluation: python evaluate.py --checkpoint runs/eval-nvae_celeba64/checkpoint.pt --eval_mode evaluate
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset celeba_64 --data "${DATA:-}" --root "$ROOT" --save nvae_celeba64 \
    --num_preprocess_blocks 1 --num_preprocess_cells 2 --num_cell_per_cond_enc 2 \
    --num_postprocess_blocks 1 --num_postprocess_cells 2 --num_cell_per_cond_dec 2 --num_latent_per_group 20 \
    --num_channels_enc 64 --num_channels_dec 64 --num_latent_scales 3 --num_groups_per_scale 20 --ada_groups \
    --num_nf 1 --batch_size 16 --epochs 90 --weight_decay_norm 1e-1 --fast_adamax --use_se --res_dist \
    --num_process_per_node 8 "$@"
