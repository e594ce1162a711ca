#!/usr/bin/env bash
# HVAE on MNIST for a machine without a GPU: a narrow network whose first blocks halve the resolution, the published
# objective and optimizer over few epochs at a higher rate. Scored against digits turned upside down and, with SETS, other images.
#
#   DATA=path/to/mnist bash scripts/recipes/hvae_mnist_cpu.sh
#   MODEL=lvae ...                                                    the same network as a ladder, or MODEL=biva
#   SETS="strokes=FOLDER mednist=FOLDER" ...                          further sets to tell from digits: folders of images
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MODEL=${MODEL:-hvae}
SAVE=${MODEL}_mnist_cpu

block() { echo "{\"block\": \"ResBlockConv2d\", \"out_channels\": 32, \"kernel_size\": $1, \"stride\": $2, \"gated\": false}"; }
"$PYTHON" "$REPOSITORY/train.py" --model "$MODEL" --dataset mnist --data "${DATA:-}" --root "$ROOT" --save "$SAVE" \
    --config_deterministic "[[$(block 5 2), $(block 3 1)], [$(block 3 2), $(block 3 1)], [$(block 3 1), $(block 3 1)]]" \
    --config_stochastic '[{"block": "GaussianConv2d", "latent_features": 8}, {"block": "GaussianDense", "latent_features": 16},
        {"block": "GaussianDense", "latent_features": 8}]' \
    --batch_size 128 --epochs 4 --optimizer adam --learning_rate 1e-3 --learning_rate_min 1e-4 --warmup_epochs 0 \
    --weight_decay 0 --free_nats 2 --free_nats_portion 0.4 --kl_anneal_portion 0.2 \
    --val_fraction 0.05 --keep_best --val_every 1 --val_iw_samples 1 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$SAVE/best.pt" --eval_mode anomaly \
    --scores nelbo lk llr kl_profile kl_knn kl_gmm typicality complexity --ood turned=test:rot180 ${SETS:-} \
    --max_ood 1000 --num_draws 4 --batch_size 250
