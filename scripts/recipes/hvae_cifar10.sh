#!/usr/bin/env bash
# HVAE (Havtorn et al. 2021, "Hierarchical VAEs Know What They Don't Know") on CIFAR-10: published network, schedule and
# optimizer, scored against SVHN by LLR>k. Departures: skips that the published code leaves dead are alive
# (--compat_official brings its networks back); images are dequantized anew every epoch, theirs once for each worker;
# the best model is chosen on a tenth of the training images, theirs on the test images.
#
#   DATA=path/to/cifar10 OTHER=path/to/svhn bash scripts/recipes/hvae_cifar10.sh
#   MODEL=lvae ...                         the same network as a ladder, or MODEL=biva
# IW=1000: importance samples behind L; published were 1 and 1000. Without OTHER nothing is scored.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MODEL=${MODEL:-hvae}
SAVE=${MODEL}_cifar10

"$PYTHON" "$REPOSITORY/train.py" --model "$MODEL" --dataset cifar10 --data "${DATA:-}" --root "$ROOT" --save "$SAVE" \
    --config_deterministic cifar10 --config_stochastic cifar10 --dequantize \
    --likelihood_module DiscretizedLogisticMixLikelihoodConv2d \
    --batch_size 128 --epochs 2000 --optimizer adam --learning_rate 3e-4 --learning_rate_min 3e-4 \
    --warmup_epochs 0 --weight_decay 0 --free_nats 2 --free_nats_portion 0.2 --kl_anneal_portion 0.1 \
    --val_fraction 0.1 --val_every 10 --val_iw_samples 1 --keep_best "$@"

[ -z "${OTHER:-}" ] || "$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$SAVE/best.pt" --eval_mode anomaly \
    --scores nelbo lk llr --ood "svhn=$OTHER" --num_draws 1 --iw_samples_elbo "${IW:-1}" --batch_size 500
