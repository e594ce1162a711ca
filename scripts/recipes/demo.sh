#!/usr/bin/env bash
# The main job on synthetic radiographs, on a laptop: draws the phantom data set, trains two small models on its normal
# images at the same time, a denoising autoencoder and an NVAE, on one core each, and compares what they find.
# Runs again from where it stopped. Flags go to both trainings.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DAE=$ROOT/eval-demo_dae
NVAE=$ROOT/eval-demo_nvae
export OMP_NUM_THREADS=1

JOBS=()
run() { "$PYTHON" "$REPOSITORY/$1" "${@:2}" & JOBS+=($!); }
finish() { for job in "${JOBS[@]}"; do wait "$job"; done; JOBS=(); }
named() { trap '' INT; while IFS= read -r line; do echo "$1: $line"; done; }
# Where one job fails, or Ctrl-C comes, the other ends too: a training writes its checkpoint.
trap 'kill ${JOBS[@]+"${JOBS[@]}"} 2>/dev/null || true; wait' EXIT

train=(train.py --dataset phantom --num_phantoms 1800 --root "$ROOT" --cont_training --image_every 0)
run "${train[@]}" --model dae --save demo_dae --batch_size 8 --coarse_noise 0.16 --epochs 17 --val_every 17 "$@"
PYTHONUNBUFFERED=1 run "${train[@]}" --model nvae --save demo_nvae \
    --batch_size 16 --epochs 10 --warmup_epochs 1 --learning_rate 5e-3 --fast_adamax \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 1 --num_groups_per_scale 3 --num_latent_per_group 4 \
    --num_channels_enc 8 --num_preprocess_blocks 3 --num_preprocess_cells 1 \
    --num_channels_dec 8 --num_postprocess_blocks 3 --num_postprocess_cells 1 --num_mixture_dec 3 \
    --val_every 5 --val_iw_samples 2 "$@" > >(named nvae) 2>&1
finish

evaluate=(evaluate.py --batch_size 50 --residual_smoothing 0.5 --residual_shift 2)   # lesions are small, noise is weak
PYTHONUNBUFFERED=1 run "${evaluate[@]}" --compare "$DAE" "$NVAE" --save "$ROOT/demo_comparison" --num_draws 1 \
    > >(named comparison) 2>&1
run "${evaluate[@]}" --checkpoint "$DAE/checkpoint.pt" --eval_mode anomaly --save "$DAE/anomaly"
finish
