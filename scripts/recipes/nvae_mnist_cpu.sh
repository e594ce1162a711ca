#!/usr/bin/env bash
# NVAE on dynamically binarized MNIST for a machine without a GPU: a small network, under 20 minutes on two cores.
# The published run (nvae_mnist.sh) has 33 M parameters and takes 2 V100 for 21 hours.
#   DATA=path/to/mnist bash scripts/recipes/nvae_mnist_cpu.sh       (DATA holds MNIST/raw/*.gz)
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ROOT=${ROOT:-runs}
: "${DATA:?set DATA to the folder that holds MNIST/raw}"

"$PYTHON" "$REPOSITORY/train.py" --dataset mnist --data "${DATA:-}" --root "$ROOT" --save mnist_cpu --cont_training \
    --batch_size 100 --epochs 3 --warmup_epochs 1 --learning_rate 1e-2 --learning_rate_min 1e-3 \
    --fast_adamax --amp bf16 --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 2 --num_groups_per_scale 4 --ada_groups --num_latent_per_group 8 \
    --num_channels_enc 16 --num_preprocess_blocks 2 --num_preprocess_cells 1 \
    --num_channels_dec 16 --num_postprocess_blocks 2 --num_postprocess_cells 1 \
    --val_every 100 --val_iw_samples 1 --image_every 0 "$@"

# 100 importance samples for 10,000 images take longer than the training: the first 1,000 test images
"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-mnist_cpu/checkpoint.pt" --eval_mode evaluate \
    --save "$ROOT/eval-mnist_cpu/evaluate" --num_iw_samples 100 --batch_size 250 --max_images 1000
