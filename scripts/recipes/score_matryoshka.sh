#!/usr/bin/env bash
# SADE (Mahmood et al. 2024), configuration ve/single_matryoshka: one more level around the network of
# score_biggan.sh, for T1 and T2 of the brain at 1 mm, 176 x 208 x 160 voxels.
#
#   DATA=path/to/nifti bash scripts/recipes/score_matryoshka.sh         more flags go to train.py
#   FROZEN=1 ...                          the inner network stays as it is, as in the published frozen variant
#   INNER=runs/eval-score_biggan ...    the inner network: a run, a checkpoint, or JSON (docs/score.md)
#   MODALITIES="t1 flair" KEYS=folder/of/key/files ...
#
# DATA is a folder of NIfTI files in MNI space at 1 mm (docs/data.md, Volumes); a file may hold both channels.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
INNER=${INNER:-$ROOT/eval-score_biggan}
if [ -n "${FROZEN:-}" ]; then
    SAVE=score_matryoshka_frozen
    VARIANT=(--time_embedding_sz 128 --fourier_scale 4 --learning_rate 1e-5 --learning_rate_min 1e-5)
else
    SAVE=score_matryoshka
    VARIANT=(--trainable_inner_model --time_embedding_sz 64 --fourier_scale 2 \
        --learning_rate 1e-4 --learning_rate_min 1e-4)
fi

"$PYTHON" "$REPOSITORY/train.py" --model score --dataset brain --data "${DATA:-}" --root "$ROOT" \
    --save $SAVE --inner_model "$INNER" --modalities ${MODALITIES:-t1 t2} --key_files "${KEYS:-}" --crop 11 9 0 172 205 152 \
    --spacing 1 --volume_shape 176 208 160 --percentiles 0.01 99.9 --augment --seed 42 --amp off \
    --sde vesde --sigma_min 0.09 --sigma_max 1508 --num_scales 2000 --reduce_mean \
    --nf 16 --learnable_embedding "${VARIANT[@]}" \
    --batch_size 4 --epochs 1000000 --max_steps 1500001 --warmup_steps 10000 --grad_clip 1 --ema_decay 0.9999 \
    --save_every 1000 --log_every 100 --image_every 10000 --snr 0.17 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-$SAVE" --eval_mode anomaly --batch_size 4
