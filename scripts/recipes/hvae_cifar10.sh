#!/usr/bin/env bash
# HVAE (Havtorn et al. 2021, "Hierarchical VAEs Know What They Don't Know") on CIFAR-10: published network, schedule.
# Departures: skips that the published code leaves dead are alive (--compat_official brings its networks back); the
# optimizer is Adamax at their constant rate, theirs Adam, and gradients are clipped, since Adamax remembers an early
# outlier of the KL for thousands of steps; grey levels are not dequantized, their likelihood sums to 1.
#
#   DATA=path/to/cifar10 bash scripts/recipes/hvae_cifar10.sh          from any folder; --cont_training goes on
#   ... hvae_cifar10.sh --model lvae --save lvae_cifar10         the same network as a ladder, or --model biva
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --model hvae --dataset cifar10 --data "${DATA:-}" --root "$ROOT" --save hvae_cifar10 \
    --config_deterministic cifar10 --config_stochastic cifar10 --batch_size 128 --epochs 2000 \
    --learning_rate 3e-4 --learning_rate_min 3e-4 --warmup_epochs 0 --weight_decay 0 --optimizer adam \
    --free_nats 2 --free_nats_portion 0.2 --kl_anneal_portion 0.1 "$@"
