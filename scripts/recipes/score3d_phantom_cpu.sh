#!/usr/bin/env bash
# Score-based anomaly detection in 3D on synthetic brains, for a machine without a GPU: a small score network, then
# the scores of volumes with hyperintensities and tumours.
#
#   bash scripts/recipes/score3d_phantom_cpu.sh                           more flags go to train.py
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --model score3d --dataset brain_phantom --data "${DATA:-}" --root "$ROOT" \
    --save score3d_phantom --cont_training --spacing 6 --image_size 32 --sigma_max 110 \
    --nf 16 --blocks_down 1 2 2 --blocks_up 1 1 --batch_size 8 --epochs 60 --learning_rate 1e-3 \
    --learning_rate_min 1e-4 --warmup_steps 50 --ema_decay 0.999 --val_every 10 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-score3d_phantom" --eval_mode anomaly
