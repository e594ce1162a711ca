#!/usr/bin/env bash
# Finetuning of a score network by Reptile, as SADE (Mahmood et al. 2024) meant it: 20 steps of Adam without
# momentum, then the slow weights, which are evaluated, move a tenth of the way. 5,000 moves, 3e-4. Departures:
# published code stopped at its first step, and clipped every gradient to 0.
#
#   DATA=path/to/nifti bash scripts/recipes/score_finetune.sh           more flags go to train.py
#   INIT=runs/eval-score_biggan ...     the run or checkpoint to begin from; the network and data flags are its
#   MODALITIES="t1 flair" KEYS=folder/of/key/files ...
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
INIT=${INIT:-$ROOT/eval-score_biggan}

"$PYTHON" "$REPOSITORY/train.py" --model score --dataset brain --data "${DATA:-}" --root "$ROOT" \
    --save score_finetune --init_from "$INIT" \
    --modalities ${MODALITIES:-t1 t2} --key_files "${KEYS:-}" --crop 11 9 0 172 205 152 --spacing 2 \
    --volume_shape 96 112 80 --percentiles 0.01 99.9 --augment --seed 42 --amp off \
    --sde vesde --sigma_min 0.06 --sigma_max 545 --num_scales 2000 --reduce_mean \
    --nf 24 --blocks_down 2 2 2 2 4 --blocks_up 1 1 1 1 --resblock_type biggan --act memswish --norm_num_groups 8 \
    --time_embedding_sz 64 --fourier_scale 2 --learnable_embedding --scale_by_sigma \
    --batch_size 8 --epochs 100000 --max_steps 100000 --reptile_steps 20 --ema_decay 0.9 --beta1 0 \
    --learning_rate 3e-4 --learning_rate_min 3e-4 --warmup_steps 1 --grad_clip 0 --save_every 1000 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-score_finetune" --eval_mode anomaly --batch_size 64
