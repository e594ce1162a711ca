#!/usr/bin/env bash
# Score-based anomaly detection in 3D on synthetic brains, for a machine without a GPU: a small score network, then the
# density of every voxel's score norms (spatial_msma), and an autoencoder beside them; scores, maps and segmentations of
# volumes with hyperintensities and tumours. 32 x 32 x 32 voxels of 6 mm; 20 minutes on 2 cores.
#
#   bash scripts/recipes/score_phantom_cpu.sh                           more flags go to all three trainings
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DATA_FLAGS=(--dataset brain_phantom --data "${DATA:-}" --num_phantoms 136 --spacing 6 --image_size 32)

train() { "$PYTHON" "$REPOSITORY/train.py" "$@" --root "$ROOT" --cont_training "${DATA_FLAGS[@]}" --image_every 0; }
evaluate() {
    "$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$1" --eval_mode anomaly --batch_size 4 \
        --body_mask 0.03 --num_gallery 12 "${@:2}"
}

train --model score --save score_phantom --sigma_min 0.05 --sigma_max 50 --num_scales 200 --nf 16 \
    --blocks_down 1 2 2 --blocks_up 1 1 --norm_num_groups 4 --time_embedding_sz 32 --amp bf16 \
    --batch_size 8 --epochs 60 --learning_rate 1e-3 --learning_rate_min 1e-4 --warmup_steps 50 --val_every 20 "$@"

train --model spatial_msma --save spatial_msma_phantom --score_model "$ROOT/eval-score_phantom" --msma_levels 10 \
    --num_blocks 4 --hidden_features 128 --global_embedding_size 128 --patches_per_step 2048 --batch_size 4 \
    --epochs 26 --learning_rate 1e-3 --ema_halflife_kimg 0.2 --standardize --val_every 13 "$@"

train --model ae --save ae_brain_phantom --batch_size 8 --epochs 60 --val_every 20 "$@"

evaluate spatial_msma_phantom --scores voxel_nll voxel_nll_mean msma_gmm msma_knn
evaluate ae_brain_phantom
