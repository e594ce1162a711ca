#!/usr/bin/env bash
# NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz 2020), ImageNet at 32 x 32.
# Published: 3.92 bits per dimension (with flows); 268.51 M parameters, 28 groups; 24 V100 for 70 hours.
#
#   DATA=path/to/imagenet-oord-lmdb_32 bash scripts/recipes/nvae_imagenet32.sh
#   ... nvae_imagenet32.sh --dry_run                 parameters, memory, speed, time, also without DATA; leaves nothing
#   ... nvae_imagenet32.sh --cont_training           goes on where it stopped
#   mpirun -npernode 1 -H host0,host1,host2 bash nvae_imagenet32.sh      with IP_ADDR set to the address of host0
#   NODES=1 ... nvae_imagenet32.sh                   on one node of 8 GPUs, a third of the published joint batch
#
# DATA is the folder that holds train.lmdb and validation.lmdb (scripts/convert_tfrecord_to_lmdb.py), ROOT the folder of runs.
# The published evaluation: python evaluate.py --checkpoint runs/eval-nvae_imagenet32/checkpoint.pt --eval_mode evaluate
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset imagenet_32 --data "${DATA:-}" --root "$ROOT" --save nvae_imagenet32 \
    --num_preprocess_blocks 1 --num_preprocess_cells 2 --num_cell_per_cond_enc 2 \
    --num_postprocess_blocks 1 --num_postprocess_cells 2 --num_cell_per_cond_dec 2 --num_latent_per_group 20 \
    --num_channels_enc 192 --num_channels_dec 192 --num_latent_scales 1 --num_groups_per_scale 28 --num_nf 1 \
    --batch_size 24 --epochs 45 --warmup_epochs 1 --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --weight_decay_norm_init 1e2 --fast_adamax --use_se --res_dist --num_process_per_node 8 \
    --num_proc_node "${NODES:-3}" --node_rank "${NODE_RANK:-0}" --master_address "${IP_ADDR:-127.0.0.1}" "$@"
