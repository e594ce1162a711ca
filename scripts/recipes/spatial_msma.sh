#!/usr/bin/env bash
# Spatial-MSMA (Mahmood et al. 2024, arXiv 2407.00148), the published flow configurations: the density of every voxel's
# score norms, with the score network of score_biggan.sh or score_matryoshka.sh; then scores and maps of test volumes.
#
#   DATA=path/to/nifti bash scripts/recipes/spatial_msma.sh gmm           more flags go to train.py
#   ... spatial_msma.sh v2       more images and fewer voxels a step, up to the most noise
#   ... spatial_msma.sh ve       a short run with small patches. Departure: its base distribution is not published
#   ... spatial_msma.sh matryoshka_gmm                                    at 1 mm, around score_matryoshka.sh
#   SCORE_MODEL=runs/eval-NAME MODALITIES="t1 flair" KEYS=folder/of/key/files ...
#
# DATA is a folder of NIfTI files in MNI space at 1 mm (docs/data.md, Volumes); a file may hold both channels.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CONFIG=${1:?name a configuration: gmm, v2, ve or matryoshka_gmm}
shift

SCORES=score_biggan
GRID=(--spacing 2 --volume_shape 96 112 80)
WIDE=(--global_patch_kernel 17 --global_patch_stride 8)
case $CONFIG in          # steps are thousands of images / images a batch
gmm)
    FLOW=(--batch_size 2 --max_steps 150000 --patches_per_step 16384 --patch_batch_size 16384
        --local_patch_kernel 3 "${WIDE[@]}" --msma_max_timestep 0.8) ;;
v2)
    FLOW=(--batch_size 32 --max_steps 6250 --patches_per_step 1024 --patch_batch_size 32
        --local_patch_kernel 3 "${WIDE[@]}" --msma_max_timestep 1) ;;
ve)
    FLOW=(--batch_size 1 --max_steps 1000 --patches_per_step 2 --patch_batch_size 32
        --local_patch_kernel 3 --global_patch_kernel 11 --global_patch_stride 4 --msma_max_timestep 1) ;;
matryoshka_gmm)
    SCORES=score_matryoshka
    GRID=(--spacing 1 --volume_shape 176 208 160)
    FLOW=(--batch_size 2 --max_steps 100000 --patches_per_step 16384 --patch_batch_size 2048
        --local_patch_kernel 5 "${WIDE[@]}" --msma_max_timestep 0.8) ;;
*)
    echo "error: there is no configuration $CONFIG: gmm, v2, ve or matryoshka_gmm" >&2
    exit 2 ;;
esac

"$PYTHON" "$REPOSITORY/train.py" --model spatial_msma --dataset brain --data "${DATA:-}" --root "$ROOT" \
    --save "spatial_msma_$CONFIG" --score_model "${SCORE_MODEL:-$ROOT/eval-$SCORES}" \
    --modalities ${MODALITIES:-t1 t2} --key_files "${KEYS:-}" --crop 11 9 0 172 205 152 "${GRID[@]}" \
    --percentiles 0.01 99.9 --augment --no-cache_maps --seed 42 --amp off \
    --base_distribution gaussian_mixture --num_blocks 20 --context_embedding_size 128 --use_global_context \
    --global_embedding_size 512 --msma_levels 20 --msma_min_timestep 0.01 --msma_schedule geometric \
    --learning_rate 3e-4 --weight_decay 1e-5 --ema_halflife_kimg 50 --ema_rampup_ratio 0.01 "${FLOW[@]}" \
    --epochs 1000000 --keep_best --save_every 1000 --log_every 100 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-spatial_msma_$CONFIG/best.pt" --eval_mode anomaly
