#!/usr/bin/env bash
# Pneumonia against normal chest X-rays of one hospital, such as those of children by Kermany et al. 2018, without a GPU: a
# multi-scale likelihood at the resolution of the files and a denoising autoencoder are trained on the normal images at the same
# time, on one core each, and their scores are added up: `dose` of haar and `residual_mean` of the DAE. About 10 minutes on two
# cores for 650 training images of 224 x 224.
#   DATA=path/to/chest_xray bash scripts/recipes/pneumonia_cpu.sh         a folder for each class, one of them named normal
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ROOT=${ROOT:-runs}
: "${DATA:?set DATA to the folder that holds a folder for each class, one of them named normal}"
export OMP_NUM_THREADS=1

# Where one training fails, or Ctrl-C comes, the other ends too: it writes its checkpoint, and the next start goes on from there.
trap 'kill ${JOBS[@]+"${JOBS[@]}"} 2>/dev/null || true; wait' EXIT
JOBS=()
train() { "$PYTHON" "$REPOSITORY/train.py" --dataset folder --data "${DATA:-}" --root "$ROOT" --cont_training --image_every 0 \
    --val_every 100 "$@" & JOBS+=($!); }
train --model haar --save pneumonia_haar --image_size 224 --epochs 7 "$@"
train --model dae --save pneumonia_dae --batch_size 16 --epochs 24 "$@"
for job in "${JOBS[@]}"; do wait "$job"; done
JOBS=()

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-pneumonia_haar" "$ROOT/eval-pneumonia_dae" --eval_mode anomaly \
    --primary_score pneumonia_haar/dose+pneumonia_dae/residual_mean --match --save "$ROOT/pneumonia"
