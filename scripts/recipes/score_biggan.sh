#!/usr/bin/env bash
# SADE (Mahmood et al. 2024), configuration ve/biggan: a score network of T1 and T2 of the brain at 2 mm, 96 x 112 x 80
# voxels, 43,986,722 parameters. Flows (spatial_msma.sh) and the matryoshka stand on it.
#
#   DATA=path/to/nifti bash scripts/recipes/score_biggan.sh                more flags go to train.py
#   MODALITIES="t1 flair" KEYS=folder/of/key/files ...
#   ... score_biggan.sh --cont_training                        goes on where it stopped
#
# DATA is a folder of NIfTI files in MNI space at 1 mm (docs/data.md, Volumes); a file may hold both channels.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"$PYTHON" "$REPOSITORY/train.py" --model score --dataset brain --data "${DATA:-}" --root "$ROOT" \
    --save score_biggan \
    --modalities ${MODALITIES:-t1 t2} --key_files "${KEYS:-}" --crop 11 9 0 172 205 152 --spacing 2 \
    --volume_shape 96 112 80 --percentiles 0.01 99.9 --augment --seed 42 --amp off \
    --sde vesde --sigma_min 0.06 --sigma_max 545 --num_scales 2000 --reduce_mean \
    --nf 24 --blocks_down 2 2 2 2 4 --blocks_up 1 1 1 1 --resblock_type biggan --act memswish --norm_num_groups 8 \
    --time_embedding_sz 64 --fourier_scale 2 --learnable_embedding --scale_by_sigma \
    --batch_size 8 --epochs 1000000 --max_steps 1500001 --learning_rate 2e-4 --learning_rate_min 2e-4 \
    --warmup_steps 1000 --grad_clip 1 --ema_decay 0.9999 --save_every 1000 --log_every 100 --image_every 10000 \
    --snr 0.17 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-score_biggan" --eval_mode anomaly --batch_size 64
