#!/usr/bin/env bash
# COVID-19 against normal chest X-rays without a GPU: an NVAE and a denoising autoencoder are trained on the Normal class at the
# same time, on one core each, and their scores are added up, as development data chose beforehand (docs/results.md): `latent_knn`
# of the NVAE and `residual_mean` of the DAE. On two cores, training on 2,600 images takes about 20 minutes and the evaluation, which
# shares the images between two processes, about 4.
#   DATA=path/to/COVID-19_Radiography_Dataset bash scripts/recipes/covid_cpu.sh
set -euo pipefail
PYTHON=${PYTHON:-python}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ROOT=${ROOT:-runs}
: "${DATA:?set DATA to the folder that holds Normal, COVID, Viral Pneumonia}"
export OMP_NUM_THREADS=1

# Where one training fails, or Ctrl-C comes, the other ends too: it writes its checkpoint, and the next start goes on from there.
trap 'kill ${JOBS[@]+"${JOBS[@]}"} 2>/dev/null || true; wait' EXIT
JOBS=()
train() { "$PYTHON" "$REPOSITORY/train.py" --dataset covid --data "${DATA:-}" --root "$ROOT" --cont_training --image_every 0 \
    --val_every 100 "$@" & JOBS+=($!); }
train --model nvae --save covid_nvae --batch_size 16 --epochs 9 --warmup_epochs 1 --fast_adamax --amp off \
    --arch_instance res_bnswish --use_se --res_dist --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --num_latent_scales 2 --num_groups_per_scale 6 --ada_groups --num_latent_per_group 8 \
    --num_channels_enc 8 --num_preprocess_blocks 1 --num_preprocess_cells 2 \
    --num_channels_dec 8 --num_postprocess_blocks 1 --num_postprocess_cells 2 --val_iw_samples 2 "$@"
train --model dae --save covid_dae --batch_size 8 --coarse_noise 0.16 --epochs 6 "$@"
for job in "${JOBS[@]}"; do wait "$job"; done
JOBS=()

"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$ROOT/eval-covid_nvae" "$ROOT/eval-covid_dae" --eval_mode anomaly \
    --primary_score covid_nvae/latent_knn+covid_dae/residual_mean --scores nelbo kl_knn dose --match \
    --max_train_images 3000 --device cpu --num_process_per_node 2 --save "$ROOT/covid"
