#!/usr/bin/env bash
# Your own images, from a folder to a report: trains a denoising autoencoder on the normal images, scores the others, and ends
# with the path of the report. A dry run first measures this machine and counts the images; it sets the length of the training,
# about 15 minutes at most, and the size of the images and of the network.
#   bash scripts/recipes/own_images.sh FOLDER          FOLDER/normal and perhaps folders of anomalies; docs/data.md has the layouts
#   SAVE=name bash scripts/recipes/own_images.sh FOLDER --normal_classes healthy          more flags go to train.py
# The same command again goes on where it stopped.
set -euo pipefail
PYTHON=${PYTHON:-python}
ROOT=${ROOT:-runs}
SAVE=${SAVE:-own_images}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
MOST_SECONDS=${MOST_SECONDS:-900}
refuse() { echo "error: $1" >&2; exit 2; }

[ $# -gt 0 ] || refuse "which images? bash $0 FOLDER [FLAGS of train.py]"
DATA=$1
[ -e "$DATA" ] || refuse "$DATA does not exist"
for flag in "${@:2}"; do
    case $flag in
        --save | --save=* | --root | --root=*) refuse "this script names its run itself: SAVE=name ROOT=folder bash $0 $DATA" ;;
    esac
done
RUN=$ROOT/eval-$SAVE

flags=(--dataset folder --data "$DATA" --model dae --batch_size 16 "${@:2}")
if [ -f "$RUN/checkpoint.pt" ]; then
    known=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["data"])' "$RUN/args.json")
    [ "$(realpath "$known")" = "$(realpath "$DATA")" ] ||
        refuse "$RUN was trained on $known. Choose another name for this run: SAVE=name bash $0 $DATA"
    echo "going on with $RUN"
    flags=(--config "$RUN/args.json" "${flags[@]}")          # sized already
else
    dry=$("$PYTHON" "$REPOSITORY/train.py" "${flags[@]}" --dry_run) || { echo "$dry"; exit 1; }
    side=$(sed -nE 's/^images +[0-9]+ x ([0-9]+) x .*/\1/p' <<< "$dry")
    images=$(sed -nE 's/^images .* ([0-9,]+) to train on$/\1/p' <<< "$dry" | tr -d ,)
    step=$((10#$(sed -nE 's/^speed .* ([0-9.]+) s a step$/\1/p' <<< "$dry" | tr -d .)))           # in hundredths of a second
    # Where a step takes less than 0.05 s, as on a GPU: images of twice the side and a wider network, about five times the work.
    large=$((step < 5))
    step=$((large ? 5 * step + 1 : step))
    steps=$((100 * MOST_SECONDS / step))
    of_epoch=$((images < 16 ? 1 : images / 16))
    # With few images, the loss on normal validation images rises again after about 200 epochs, and less is detected.
    most=$((of_epoch < 7 ? 200 * of_epoch : 1500))
    steps=$((steps > most ? most : steps < 200 ? 200 : steps))
    epochs=$(((steps + of_epoch - 1) / of_epoch))
    minutes=$((epochs * of_epoch * step / 6000 + 1))
    echo "$images normal images to train on: $epochs epochs of $of_epoch steps, about $minutes minute$([ $minutes = 1 ] || echo s)" \
        "if the machine stays as busy as it is now"
    flags+=(--epochs "$epochs" --val_every $((epochs > 10 ? epochs / 5 : 1)) --image_every 0)
    ((!large)) || { flags+=(--image_size 128 --widths 32 64 96 128) && side=128; }
    flags+=("${@:2}")                                        # given flags win
    [[ " ${*:2}" == *" --image_size"* ]] ||
        echo "images are resized to $side x $side pixels; a larger --image_size shows finer detail and takes longer"
fi

"$PYTHON" "$REPOSITORY/train.py" --root "$ROOT" --save "$SAVE" --cont_training "${flags[@]}"
"$PYTHON" "$REPOSITORY/evaluate.py" --checkpoint "$RUN" --eval_mode anomaly --save "$RUN/anomaly"
