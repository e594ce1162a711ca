#!/usr/bin/env bash
# SADE (Mahmood et al. 2024), configuration ve/toy: T1 and T2 of the brain at 4 mm, 20 steps. It shows in a minute
# that all runs. Departure: the configuration says 48 x 64 x 40 voxels, its data had 48 x 64 x 48, as here.
#
#   DATA=path/to/nifti bash scripts/recipes/score_toy.sh                more flags go to train.py
#   MODALITIES="t1 flair" KEYS=folder/of/key/files ...
#
# DATA is a folder of NIfTI files in MNI space at 1 mm (docs/data.md, Volumes); a file may hold both channels.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${DATA:?set DATA to a folder of NIfTI files}"

"$PYTHON" "$REPOSITORY/train.py" --model score --dataset brain --data "$DATA" --root "$ROOT" --save score_toy \
    --modalities ${MODALITIES:-t1 t2} --key_files "${KEYS:-}" --crop 11 9 0 172 205 152 --spacing 4 \
    --volume_shape 48 64 48 --percentiles 0.01 99.9 --augment --seed 42 --amp off \
    --sde vesde --sigma_min 0.06 --sigma_max 545 --num_scales 10 --reduce_mean \
    --nf 8 --blocks_down 1 2 1 --blocks_up 1 1 --resblock_type biggan --act memswish --norm_num_groups 2 \
    --time_embedding_sz 32 --fourier_scale 2 --no-learnable_embedding --scale_by_sigma \
    --batch_size 4 --epochs 20 --max_steps 20 --learning_rate 2e-4 --learning_rate_min 2e-4 --warmup_steps 1000 \
    --grad_clip 1 --ema_decay 0.9999 --save_every 10 --log_every 2 --image_every 10 --snr 0.17 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-score_toy" --eval_mode anomaly --batch_size 8
