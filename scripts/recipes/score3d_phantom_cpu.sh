#!/usr/bin/env bash
# Score-based anomaly detection in 3D on synthetic brains, for a machine without a GPU: a small score network, then the
# density of every voxel's score norms (spatial_msma); scores and maps of volumes with hyperintensities and tumours.
#
#   bash scripts/recipes/score3d_phantom_cpu.sh                           more flags go to both trainings
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --model score3d --dataset brain_phantom --data "${DATA:-}" --root "$ROOT" \
    --save score3d_phantom --cont_training --spacing 6 --image_size 32 --sigma_max 110 \
    --nf 16 --blocks_down 1 2 2 --blocks_up 1 1 --batch_size 8 --epochs 60 --learning_rate 1e-3 \
    --learning_rate_min 1e-4 --warmup_steps 50 --ema_decay 0.999 --val_every 10 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/train.py" --model spatial_msma --dataset brain_phantom --data "${DATA:-}" --root "$ROOT" \
    --save spatial_msma_phantom --cont_training --spacing 6 --image_size 32 --score_model "$ROOT/eval-score3d_phantom" \
    --num_blocks 4 --hidden_features 64 --context_embedding_size 32 --global_embedding_size 64 \
    --patches_per_step 2048 --batch_size 4 --epochs 40 --val_every 10 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-score3d_phantom" --eval_mode anomaly
"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-spatial_msma_phantom" --eval_mode anomaly
