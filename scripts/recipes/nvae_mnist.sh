#!/usr/bin/env bash
# NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz 2020), MNIST, the run without flows.
# Published result: 78.01 nats of negative log-likelihood, importance-weighted with 1000 samples.
# Published cost: 2 V100 GPUs for 21 hours. Without GPUs it starts too, as two CPU processes, far too slow to finish.
#
#   DATA=path/to/mnist bash scripts/recipes/nvae_mnist.sh                              from any folder
#   ... nvae_mnist.sh --cont_training                                                  goes on where it stopped
#   ... nvae_mnist.sh --num_process_per_node 1 --batch_size 400                        one GPU, the same joint batch
#
# DATA is the folder that holds MNIST/raw (torchvision's layout), ROOT the folder of runs. The published evaluation is
#   python evaluate.py --checkpoint runs/eval-nvae_mnist/checkpoint.pt --data path/to/mnist --eval_mode evaluate
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --dataset mnist --data "${DATA:-}" --root "$ROOT" --save nvae_mnist \
    --batch_size 200 --epochs 400 --fast_adamax --weight_decay_norm 1e-2 \
    --num_latent_scales 2 --num_groups_per_scale 10 --ada_groups --num_latent_per_group 20 --num_nf 0 \
    --num_channels_enc 32 --num_preprocess_blocks 2 --num_preprocess_cells 3 --num_cell_per_cond_enc 2 \
    --num_channels_dec 32 --num_postprocess_blocks 2 --num_postprocess_cells 3 --num_cell_per_cond_dec 2 \
    --use_se --res_dist --num_process_per_node 2 "$@"
