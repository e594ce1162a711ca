#!/usr/bin/env bash
# The VAE of the MedNIST tutorial: 1,000 iterations on hands, scored against as many images of everything else.
# Departures: files are taken in the order of their names, not in that of the file system; the output is linear, as in
# the last published version, while the published AUROCs are those of a sigmoid.
#
#   DATA=path/to/MedNIST.tar.gz bash scripts/recipes/vae_mednist.sh      the tar or its folder; more flags go to train.py
#   SAVE=vae_head ... vae_mednist.sh --normal_class HeadCT --latent_dim 16
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
SAVE=${SAVE:-vae_mednist}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${DATA:?set DATA to MedNIST.tar.gz, or to the folder of it}"

"$PYTHON" "$REPOSITORY/train.py" --model vae --dataset mednist --data "$DATA" --root "$ROOT" --save "$SAVE" \
    --cont_training --normal_class Hand --seed 0 --epochs 50 --max_steps 1000 --log_every 50 --val_every 2 \
    --val_iw_samples 1 --image_every 100 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$SAVE/checkpoint.pt" --eval_mode anomaly \
    --save "$ROOT/eval-$SAVE/anomaly"
