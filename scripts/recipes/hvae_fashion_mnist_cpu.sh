#!/usr/bin/env bash
# HVAE on Fashion-MNIST for a machine without a GPU, scored against MNIST by LLR>k with the skipped latents at the mode of the
# prior, as published: a narrow network whose first blocks halve the resolution, the published objective over few epochs at a
# higher rate. The score of the figures is LLR>1, chosen beforehand.
#
#   DATA=path/to/fashion_mnist OTHER=path/to/mnist bash scripts/recipes/hvae_fashion_mnist_cpu.sh
#   SETS="kmnist=PATH notmnist=PATH" ...           further sets to tell from clothes
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MODEL=${MODEL:-hvae}
SAVE=${MODEL}_fashion_mnist_cpu

block() { echo "{\"block\": \"ResBlockConv2d\", \"out_channels\": 24, \"kernel_size\": $1, \"stride\": $2, \"gated\": false}"; }
"$PYTHON" "$REPOSITORY/train.py" --model "$MODEL" --dataset fashion_mnist --data "${DATA:-}" --root "$ROOT" --save "$SAVE" \
    --config_deterministic "[[$(block 5 2), $(block 3 1)], [$(block 3 2), $(block 3 1)], [$(block 3 1), $(block 3 1)]]" \
    --config_stochastic '[{"block": "GaussianConv2d", "latent_features": 8}, {"block": "GaussianDense", "latent_features": 16},
        {"block": "GaussianDense", "latent_features": 8}]' \
    --batch_size 128 --epochs 6 --optimizer adam --learning_rate 1e-3 --learning_rate_min 1e-4 --warmup_epochs 0 \
    --weight_decay 0 --free_nats 2 --free_nats_portion 0.4 --kl_anneal_portion 0.2 \
    --val_fraction 0.05 --keep_best --val_every 1 --val_iw_samples 1 --image_every 0 --cont_training "$@"

[ -z "${OTHER:-}" ] || "$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$SAVE/best.pt" --eval_mode anomaly \
    --scores nelbo llr kl_profile kl_knn dose typicality --primary_score llr_1 \
    --ood "mnist=$OTHER" ${SETS:-} --max_ood 1000 --num_draws 4 --llr_noise shared --batch_size 250
