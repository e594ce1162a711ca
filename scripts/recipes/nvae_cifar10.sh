#!/usr/bin/env bash
# NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz 2020), CIFAR-10.
# Published: 2.91 bits per dimension (NELBO bound, with flows); 130.85 M parameters, 30 groups; 8 V100 for 55 hours.
#
#   DATA=path/to/cifar bash scripts/recipes/nvae_cifar10.sh
#   ... nvae_cifar10.sh --dry_run                 parameters, memory, speed, time, also without DATA; leaves nothing
#   ... nvae_cifar10.sh --cont_training           goes on where it stopped
#   ... nvae_cifar10.sh --num_process_per_node 1 --accumulate 8       one GPU, the same joint batch
#
# DATA is the folder that holds cifar-10-batches-py, ROOT the folder of runs.
# The published evaluation: python evaluate.py --checkpoint runs/eval-nvae_cifar10/checkpoint.pt --eval_mode evaluate
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset cifar10 --data "${DATA:-}" --root "$ROOT" --save nvae_cifar10 \
    --num_preprocess_blocks 1 --num_preprocess_cells 2 --num_cell_per_cond_enc 2 \
    --num_postprocess_blocks 1 --num_postprocess_cells 2 --num_cell_per_cond_dec 2 --num_latent_per_group 20 \
    --num_channels_enc 128 --num_channels_dec 128 --num_latent_scales 1 --num_groups_per_scale 30 --num_nf 1 \
    --batch_size 32 --epochs 400 --weight_decay_norm 1e-1 --fast_adamax --use_se --res_dist \
    --num_process_per_node 8 "$@"
