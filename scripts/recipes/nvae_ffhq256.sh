#!/usr/bin/env bash
# NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz 2020), FFHQ at 256 x 256, 5 bits.
# Published: 0.69 bits per dimension (with flows); 330.80 M parameters, 36 groups; 24 V100 of 32 GB for 160 hours.
#
#   DATA=path/to/ffhq-lmdb bash scripts/recipes/nvae_ffhq256.sh
#   ... nvae_ffhq256.sh --dry_run                 parameters, memory, speed, time, also without DATA; leaves nothing
#   ... nvae_ffhq256.sh --cont_training           goes on where it stopped
#   mpirun -npernode 1 -H host0,host1,host2 bash nvae_ffhq256.sh      with IP_ADDR set to the address of host0
#   NODES=1 ... nvae_ffhq256.sh                   on one node of 8 GPUs, a third of the published joint batch
#
# DATA is the folder that holds train.lmdb and validation.lmdb (scripts/create_ffhq_lmdb.py), ROOT the folder of runs.
# The published evaluation: python evaluate.py --checkpoint runs/eval-nvae_ffhq256/checkpoint.pt --eval_mode evaluate
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset ffhq --data "${DATA:-}" --root "$ROOT" --save nvae_ffhq256 \
    --num_preprocess_blocks 1 --num_preprocess_cells 2 --num_cell_per_cond_enc 2 \
    --num_postprocess_blocks 1 --num_postprocess_cells 2 --num_cell_per_cond_dec 2 --num_latent_per_group 20 \
    --num_channels_enc 30 --num_channels_dec 30 --num_latent_scales 5 --num_groups_per_scale 16 --ada_groups \
    --min_groups_per_scale 4 --num_nf 2 --num_x_bits 5 --batch_size 4 --epochs 200 --learning_rate 8e-3 \
    --weight_decay_norm 1e-1 --weight_decay_norm_anneal --weight_decay_norm_init 1. --fast_adamax --use_se \
    --res_dist --num_process_per_node 8 \
    --num_proc_node "${NODES:-3}" --node_rank "${NODE_RANK:-0}" --master_address "${IP_ADDR:-127.0.0.1}" "$@"
