#!/usr/bin/env bash
# HVAE (Havtorn et al. 2021, "Hierarchical VAEs Know What They Don't Know") on MNIST: published network, schedule.
# Departures: skips that the published code leaves dead are alive (--compat_official brings its networks back); the
# optimizer is Adamax at their constant rate, theirs Adam, and gradients are clipped, since Adamax remembers an early
# outlier of the KL for thousands of steps; images are binarized anew every epoch.
#
#   DATA=path/to/mnist bash scripts/recipes/hvae_mnist.sh          from any folder; --cont_training goes on
#   ... hvae_mnist.sh --model lvae --save lvae_mnist         the same network as a ladder, or --model biva
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --model hvae --dataset mnist --data "${DATA:-}" --root "$ROOT" --save hvae_mnist \
    --config_deterministic mnist --config_stochastic mnist --batch_size 128 --epochs 1000 \
    --learning_rate 3e-4 --learning_rate_min 3e-4 --warmup_epochs 0 --weight_decay 0 --optimizer adam \
    --free_nats 2 --free_nats_portion 0.4 --kl_anneal_portion 0.2 "$@"
