"""Images beside their reconstructions: the mode `reconstruct`."""

import numpy as np
import torch

from distributed import launch
from evaluation.config import Reconstruction
from evaluation.latent_space import check_groups
from evaluation.pictures import NUM_SHOWN, image_grid, save_png
from evaluation.run import Evaluation
from utils import write_npz


@torch.no_grad()
def reconstruct(run: Evaluation) -> None:
    """Inputs beside their reconstructions at the posterior means: reconstructions.npz and .png.

    With --keep_groups there is a reconstruction from each of these numbers of groups.
    """
    config, total = run.flags(Reconstruction), getattr(run.model, 'num_groups', 0)
    kept = check_groups('keep_groups', config.keep_groups, total, most=total)
    options = [{'skip': total - k} for k in kept] or [{}]
    names = [f'reconstruction_{k}' for k in kept] or ['reconstruction']
    rows = []
    for index, batch in run.batches(run.data(), config.num_samples):
        x = batch.x.to(launch.device())
        rows.append((index, batch.id, batch.x, *(run.model.reconstruct(x, **option).cpu()
                                                 for option in options)))
    rows = sorted(launch.gather(rows), key=lambda row: row[0])
    if not launch.is_main():
        return
    x, *images = (torch.cat(column)[:config.num_samples] for column in list(zip(*rows))[2:])
    ids = [name for row in rows for name in row[1]][:config.num_samples]
    write_npz(run.out / 'reconstructions.npz', x=x.numpy(), id=np.array(ids),
              **{name: y.numpy() for name, y in zip(names, images)})
    sets = max(1, 8 // (1 + len(names)))                                 # of input and outputs in a row
    shown = torch.stack([x, *images], dim=1)[:NUM_SHOWN // 2]            # input, output(s), input, ...
    titles = ['input', *(f'{k} of {total}' for k in kept)] if kept else ['input', 'output']
    save_png(run.out / 'reconstructions.png', image_grid(shown.flatten(0, 1), columns=sets * shown.shape[1]),
             sets * titles)
    errors = [float((x - y).abs().mean()) for y in images]
    run.write_metrics('reconstruct', {
        'num_images': len(x), 'part': run.part,
        'mean_absolute_error': dict(zip(map(str, kept), errors)) if kept else errors[0]})
    for error, k in zip(errors, kept or [total]):
        groups = f' from {k} of {total} groups' if total else ''
        run.say(f"{len(x)} images{groups}, mean absolute error {error:.4f}")
    run.say(f"{run.out / 'reconstructions.png'}")
