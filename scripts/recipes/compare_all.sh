#!/usr/bin/env bash
# All families, small, on one data set: each trains for a few minutes on a CPU, then one table compares them on the same
# test images. By default the synthetic radiographs. What is trained already is not trained again.
#
#   bash scripts/recipes/compare_all.sh
#   DATASET=covid DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/compare_all.sh --epochs 30
#   FAMILIES="nvae hvae" bash scripts/recipes/compare_all.sh                      only these
#
# Flags go to every training: with 270 training images, 30 epochs take the time of 10 with the phantom's 780. At this
# size the table says which small network learns fast, not which family is best.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs/compare}
FAMILIES=${FAMILIES:-ae vae nvae hvae lvae biva}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
GIVEN=("$@")
RUNS=()

train() {   # FAMILY FLAG...
    [[ " $FAMILIES " == *" $1 "* ]] || return 0
    "$PYTHON" "$REPOSITORY/train.py" --model "$1" --dataset "${DATASET:-phantom}" --data "${DATA:-}" --root "$ROOT" \
        --save "$1" --cont_training --image_size 64 --batch_size 16 --epochs 10 --val_every 5 --val_iw_samples 2 \
        --image_every 0 "${@:2}" ${GIVEN[@]+"${GIVEN[@]}"}
    RUNS+=("$ROOT/eval-$1")
}

adam=(--optimizer adam --learning_rate 1e-3 --learning_rate_min 1e-4 --warmup_epochs 0 --weight_decay 0)
train ae --width 16 --latent_dim 64 "${adam[@]}"
train vae --width 16 --latent_dim 64 "${adam[@]}"

train nvae --warmup_epochs 1 --learning_rate 5e-3 --fast_adamax \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 1 --num_groups_per_scale 3 --num_latent_per_group 4 \
    --num_channels_enc 8 --num_preprocess_blocks 3 --num_preprocess_cells 1 \
    --num_channels_dec 8 --num_postprocess_blocks 3 --num_postprocess_cells 1 --num_mixture_dec 3

# Three stages that halve the resolution; two latents at every position, and one of the whole image.
block() { echo "{\"block\": \"ResBlockConv2d\", \"out_channels\": $1, \"kernel_size\": $2, \"stride\": 2, \"gated\": false}"; }
for family in hvae lvae biva; do
    train $family --config_deterministic "[[$(block 16 5)], [$(block 24 3)], [$(block 32 3)]]" \
        --config_stochastic '[{"block": "GaussianConv2d", "latent_features": 4},
            {"block": "GaussianConv2d", "latent_features": 8}, {"block": "GaussianDense", "latent_features": 16}]' \
        --free_nats 0 --kl_anneal_portion 0.2 "${adam[@]}"
done

"$PYTHON" "$REPOSITORY/evaluate.py" --compare "${RUNS[@]}" --save "$ROOT/comparison" --num_draws 2 --batch_size 50
