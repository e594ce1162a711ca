#!/usr/bin/env bash
# The multi-scale likelihood on chest X-rays at the resolution of the files, 299 x 299, on one CPU core: trained on the
# Normal class of the COVID-19 Radiography Database, scored against every other class. 400 steps if there are 266
# training images; with more of them, fewer epochs are enough. The primary score adds up two: the density of the model's
# statistics, to which too little is as unusual as too much, and the likelihood, to which only too much is. Development
# data chose it (docs/results.md); on images that have been resized, the likelihood alone misleads.
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/haar_chest_xray.sh
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ROOT=${ROOT:-runs}
: "${DATA:?set DATA to the folder that holds Normal, COVID, Viral Pneumonia}"

"$PYTHON" "$REPOSITORY/train.py" --model haar --dataset covid --data "${DATA:-}" --image_size 299 \
    --root "$ROOT" --save haar_chest --cont_training --epochs 18 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-haar_chest/checkpoint.pt" --eval_mode anomaly \
    --save "$ROOT/eval-haar_chest/anomaly" --num_draws 1 --num_iw_samples 1 --match \
    --primary_score dose_mahalanobis+nelbo
