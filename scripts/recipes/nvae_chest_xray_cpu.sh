#!/usr/bin/env bash
# NVAE on chest X-rays for a machine without a GPU: trained on the Normal class of the COVID-19 Radiography Database,
# scored against every other class. About 15 minutes on two cores for 270 training images.
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/nvae_chest_xray_cpu.sh
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ROOT=${ROOT:-runs}
: "${DATA:?set DATA to the folder that holds Normal, COVID, Viral Pneumonia}"

"$PYTHON" "$REPOSITORY/train.py" --dataset covid --data "${DATA:-}" --root "$ROOT" --save chest_cpu --cont_training \
    --batch_size 32 --epochs 60 --warmup_epochs 5 --fast_adamax --amp bf16 \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 2 --num_groups_per_scale 6 --ada_groups --num_latent_per_group 8 \
    --num_channels_enc 16 --num_preprocess_blocks 1 --num_preprocess_cells 2 \
    --num_channels_dec 16 --num_postprocess_blocks 1 --num_postprocess_cells 2 \
    --image_every 0 "$@"

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-chest_cpu/checkpoint.pt" --eval_mode anomaly \
    --save "$ROOT/eval-chest_cpu/anomaly" --num_draws 2 --num_iw_samples 4
