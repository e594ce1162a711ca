"""Latents of a hierarchical model: kept in files, edited, and walked through.

B images, C channels, *S their size; L groups from the top down, each with latents (B, Z, h, w); F frames.
A model that takes part has `latents(x)`, `decode(latents, temperature)` and `latent_shapes`. The modes
`latents`, `decode`, `interpolate` and `traverse` come last.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed import launch
from evaluation.config import Decoding, Interpolation, Traversal
from evaluation.pictures import NUM_SHOWN, image_grid, save_gif, save_png
from evaluation.run import Evaluation
from evaluation.sampling import temperature
from storage.arrays import read_npz
from utils import UserError, seed_noise, write_npz


def to_arrays(latents: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Names and arrays for an npz file: group_0 (B, Z, h, w) is the top group."""
    return {f'group_{i}': z.cpu().numpy() for i, z in enumerate(latents)}


def read_latents(path: str | Path, model: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, latents) of an npz file, or of each npz file in a folder; the lowest groups may be left out.

    Raises UserError if a file is missing or unreadable, or if it does not hold latents of this model.
    """
    path = Path(path)
    files = sorted(path.glob('*.npz')) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--latents {path} holds no npz file: name what --eval_mode latents wrote.")
    for file in files:
        try:
            groups = read_npz(file, 'group_')
        except (OSError, UserError) as error:
            raise UserError(f"--latents {file} cannot be read ({error}): name what --eval_mode latents "
                            f"wrote.") from None
        number = len(groups)
        shapes = [groups[f'group_{i}'].shape for i in range(number) if f'group_{i}' in groups]
        wanted = model.latent_shapes[:number]
        if not number or [s[1:] for s in shapes] != wanted or len({s[0] for s in shapes}) != 1:
            raise UserError(f"--latents {file} holds {number} groups of shapes {shapes}: this model expects "
                            f"group_0, group_1, ... with (images, {wanted or model.latent_shapes}), as many "
                            f"from the top as you like, each for the same images.")
        yield file.stem, [torch.from_numpy(groups[f'group_{i}']).float() for i in range(number)]


def check_groups(name: str, numbers: Sequence[int], total: int, most: int) -> list[int]:
    """The numbers of the flag `name`, of a model with `total` groups.

    Raises UserError for one that is not in 0 to `most`.
    """
    if wrong := [n for n in numbers if not 0 <= n <= most]:
        raise UserError(f"--{name} {wrong[0]}: this model has {total} latent groups, give 0 to {most}.")
    return list(numbers)


@torch.no_grad()
def interpolate(model: Any, a: Tensor, b: Tensor, num_frames: int) -> Tensor:
    """From images a to images b (B, C, *S), linearly in the posterior means of all groups: (F, B, C, *S)."""
    ends = list(zip(model.latents(a), model.latents(b)))
    return torch.stack([model.decode([torch.lerp(z_a, z_b, share) for z_a, z_b in ends])
                        for share in torch.linspace(0, 1, num_frames).tolist()])


@torch.no_grad()
def traverse(model: Any, x: Tensor, groups: Sequence[int], channel: int,
             shifts: Sequence[float]) -> tuple[Tensor, list[int]]:
    """Images x (B, C, *S) with one channel of one group shifted everywhere: (F, G, B, C, *S), and the channel
    of each group.

    `shifts` are in units of the latents, for which the top group's prior has a standard deviation of 1. All
    other latents stay at their posterior means. `channel` -1 is, for each group, the one that carries most
    information of these images.
    """
    latents = model.latents(x)
    information = model(x, temperature=0.0)['kl_channels'].mean(0)                       # (L, Z)
    sizes = [shape[0] for shape in model.latent_shapes]
    chosen = [int(information[group, :sizes[group]].argmax()) if channel < 0 else channel for group in groups]

    def shifted(group: int, channel: int, shift: float) -> Tensor:
        edited = list(latents)
        edited[group] = edited[group].clone()
        edited[group][:, channel] += shift
        return model.decode(edited)

    return torch.stack([torch.stack([shifted(group, c, shift) for group, c in zip(groups, chosen)])
                        for shift in shifts]), chosen


# ------------------------------------------------------------------------------------------------------ modes

@torch.no_grad()
def latents(run: Evaluation) -> None:
    """Posterior means of every group: latents_<batch>.npz with group_0 (the top), group_1, ..., id, label."""
    data, number = run.data(), 0
    if launch.is_main():
        for path in run.out.glob('latents_*.npz'):                       # of an earlier call
            path.unlink()
    launch.barrier()
    for index, batch in run.batches(data):
        arrays = to_arrays(run.model.latents(batch.x.to(launch.device())))
        write_npz(run.out / f'latents_{index:05d}.npz', **arrays, id=np.array(batch.id),
                   label=batch.y.numpy())
        number += len(batch.id)
    number = sum(launch.gather([number]))
    shapes = [list(shape) for shape in run.model.latent_shapes]
    run.write_metrics('latents', {'num_images': number, 'part': run.part, 'groups': shapes})
    run.say(f"{number} {run.part} images, {len(shapes)} groups each: {run.out}/latents_*.npz")


@torch.no_grad()
def decode(run: Evaluation) -> None:
    """Images of the latents in --latents, as they are or edited: decoded_<file>.npz and decoded.png.

    Groups that a file leaves out, the lowest ones, are drawn from the prior at the temperature.
    """
    config = run.flags(Decoding)
    at, number, files = temperature(run, config.temp), 0, 0
    for index, (name, groups) in enumerate(read_latents(config.latents, run.model)):
        files += 1
        if index % launch.world() != launch.rank():
            continue
        images = []
        for start in range(0, len(groups[0]), run.batch_size):
            seed_noise(config.seed, 'decode', index, start)
            part = [z[start:start + run.batch_size].to(launch.device()) for z in groups]
            images.append(run.model.decode(part, at).cpu())
        images = torch.cat(images)
        write_npz(run.out / f'decoded_{name}.npz', images=images.numpy())
        if index == 0:
            save_png(run.out / 'decoded.png', image_grid(images[:NUM_SHOWN]), [f'images of {name}'])
        number += len(images)
    number = sum(launch.gather([number]))
    run.write_metrics('decode', {'num_images': number, 'temperature': at, 'seed': config.seed})
    run.say(f"{number} images of {files} file(s): {run.out / 'decoded.png'}")


def interpolation(run: Evaluation) -> None:
    """Walks between pairs of images, through the latents of all groups: interpolation.png, .gif and .npz."""
    config = run.flags(Interpolation)
    x, ids = run.first_images(2 * config.num_samples)
    if launch.is_main():
        images = interpolate(run.model, x[::2], x[1::2], config.num_frames).cpu()   # (F, B, C, H, W)
        shares = [f'{share:.0%}' for share in np.linspace(0, 1, config.num_frames)]
        _write_walk(run.out / 'interpolation', images, shares, id=np.array(ids))
        run.write_metrics('interpolate', {'pairs': [list(pair) for pair in zip(ids[::2], ids[1::2])],
                                          'num_frames': config.num_frames})
        run.say(f"{config.num_samples} pairs: {run.out / 'interpolation.png'} and .gif")


def traversal(run: Evaluation) -> None:
    """Shifts one latent channel at a time: traversal_<image>.png, one row a group, and .gif and .npz."""
    config, total = run.flags(Traversal), run.model.num_groups
    groups = check_groups('groups', config.groups, total, most=total - 1) or list(range(total))
    channel, channels = config.channel, min(run.model.latent_shapes[group][0] for group in groups)
    if channel >= channels:
        raise UserError(f"--channel {channel}: a group has {channels}, give 0 to {channels - 1}, or -1.")
    x, ids = run.first_images(config.num_samples)
    shifts = torch.linspace(-config.reach, config.reach, config.num_frames).tolist()
    if launch.is_main():
        images, chosen = traverse(run.model, x, groups, channel, shifts)                # (F, G, B, C, H, W)
        for i, name in enumerate(ids):
            _write_walk(run.out / f'traversal_{i}', images[:, :, i].cpu(), [f'{by:+.2g}' for by in shifts],
                        id=np.array(name), groups=np.array(groups), channels=np.array(chosen),
                        shifts=np.array(shifts))
        run.write_metrics('traverse', {'id': ids, 'groups': groups, 'channels': chosen, 'shifts': shifts})
        run.say(f"{len(ids)} images, {len(groups)} groups: {run.out}/traversal_*.png and .gif")


def _write_walk(path: Path, frames: Tensor, titles: Sequence[str], **more: np.ndarray) -> None:
    """Frames (F, rows, C, H, W) as strips in <path>.png, one a row, under the titles of the frames, as film
    in <path>.gif, and <path>.npz.
    """
    strips = frames.transpose(0, 1)
    save_png(f'{path}.png', image_grid(strips.flatten(0, 1), columns=len(frames)), titles)
    save_gif(f'{path}.gif', [image_grid(frame) for frame in frames])
    write_npz(Path(f'{path}.npz'), images=strips.numpy(), **more)
