#!/usr/bin/env bash
# NVAE on chest X-rays for a machine without a GPU: trained on the Normal class of the COVID-19 Radiography Database,
# scored against every other class. About 20 minutes on two cores for 270 training images.
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/nvae_chest_xray_cpu.sh
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ROOT=${ROOT:-runs}
: "${DATA:?set DATA to the folder that holds Normal, COVID, Viral Pneumonia}"

"$PYTHON" "$REPOSITORY/train.py" --dataset covid --data "$DATA" --root "$ROOT" --save chest_cpu --cont_training \
    --image_size 128 --batch_size 8 --epochs 60 --warmup_epochs 2 --learning_rate 5e-3 --fast_adamax --amp bf16 \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 2 --num_groups_per_scale 6 --ada_groups --num_latent_per_group 8 \
    --num_channels_enc 16 --num_preprocess_blocks 2 --num_preprocess_cells 1 \
    --num_channels_dec 16 --num_postprocess_blocks 2 --num_postprocess_cells 1 --num_mixture_dec 5 \
    --val_every 10 --val_iw_samples 2 --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-chest_cpu/checkpoint.pt" --eval_mode anomaly \
    --save "$ROOT/eval-chest_cpu/anomaly" --num_draws 2 --num_iw_samples 4
