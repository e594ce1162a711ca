"""SYNTHETIC brains in 3D, drawn by formulas: T1-like and FLAIR-like volumes, normal, with white-matter
hyperintensities or with a tumour, and exact masks of these.

Nothing here comes from a patient. Coordinates p = (x, y, z) in mm from the middle of the head: to the right,
to the front, upwards. A head is a mixture of tissues: each voxel holds a share of each, from smooth edges of
formulas at warped coordinates; contrast, blur, a bias field and Rician noise make images of it. N voxels
along each axis.
"""

from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from phantoms.files import write_set
from readers.volumes.nifti import write_nifti
from utils import UserError

SIZE, WIDTH = 64, 192.0            # voxels along each axis, and the mm that they span
VERSION = 1                        # raise it when the drawing changes: other phantoms are then made anew
NORMAL, HYPERINTENSITIES, TUMOUR = 'normal', 'hyperintensities', 'tumour'
CLASS_NUMBER = {NORMAL: 0, HYPERINTENSITIES: 1, TUMOUR: 2}
MODALITIES, LABELS = ('t1', 'flair'), 'lesions'
CEREBRUM = (0, -3, 4), (66, 82, 68)          # middle and radii, mm
# Brightness of each tissue in T1 and FLAIR; a voxel that holds none is air.
TISSUES = {'fluid': (0.14, 0.08), 'grey': (0.50, 0.62), 'white': (0.80, 0.44), 'nuclei': (0.62, 0.56),
           'bone': (0.08, 0.08), 'scalp': (0.92, 0.66), 'muscle': (0.38, 0.36), 'lesion': (0.55, 0.92),
           'core': (0.36, 0.78), 'oedema': (0.58, 0.88)}
NOTE = """SYNTHETIC VOLUMES. No scans: a program (phantoms/brain.py) drew them from random numbers.

normal              {normal} phantoms of a healthy head, folders t1 and flair
hyperintensities    {lesions} with small bright spots in FLAIR, dark in T1, around the ventricles
tumour              {tumours} with a mass, oedema around it and the tissue beside it pushed aside
*/lesions           1 where a spot, a mass or oedema is

They are of use for demonstrations and tests, and say nothing about how well a method works on patients.
"""


# ----------------------------------------------------------------------------------------------------- shapes

def edge(depth: np.ndarray, width: float) -> np.ndarray:
    """Share of a body in a voxel whose middle lies `depth` mm inside it: 0 to 1 over about `width` mm."""
    return np.clip(depth / np.float32(width) + np.float32(0.5), 0, 1)


def ball(p: np.ndarray, centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Depth in mm, roughly, below the surface of an ellipsoid; negative outside."""
    q = [(x - np.float32(c)) / np.float32(r) for x, c, r in zip(p, centre, radii, strict=True)]
    distance = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
    return (1 - distance) * np.float32(np.mean(radii))


def smooth_field(rng: np.random.Generator, mm: float, n: int) -> np.ndarray:
    """Gaussian noise of unit variance with structures of about `mm`: (N, N, N)."""
    cells = max(4, round(2 * WIDTH / mm))
    coarse = rng.standard_normal((min(cells, n),) * 3).astype(np.float32)
    coarse = gaussian_filter(coarse, 1.0)
    fine = zoom(coarse, n / len(coarse), order=1, mode='nearest', grid_mode=True)
    fine = gaussian_filter(fine, n / len(coarse) / 2)                # no edges between the linear pieces
    return (fine - fine.mean()) / fine.std()


# ---------------------------------------------------------------------------------------------------- anatomy

def coordinates(rng: np.random.Generator, n: int) -> np.ndarray:
    """p of each voxel (3, N, N, N) in a head of average shape: turned, scaled and warped at random."""
    axis = (np.arange(n, dtype=np.float32) + 0.5) * np.float32(WIDTH / n) - np.float32(WIDTH / 2)
    p = np.stack(np.meshgrid(axis, axis, axis, indexing='ij'))
    p -= rng.normal(0, 1.5, (3, 1, 1, 1)).astype(np.float32)
    angles = rng.normal(0, 0.04, 3)                                  # rad
    turn = np.eye(3) + np.cross(np.eye(3), angles)                   # small angles
    scale = rng.normal(1.0, 0.035) * rng.normal(1.0, 0.025, 3)
    p = np.tensordot((turn / scale[:, None]).astype(np.float32), p, 1)
    return p + np.stack([1.6 * smooth_field(rng, 45, n) for _ in range(3)])


def draw_head(p: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Shares of the tissues (N, N, N) of a healthy head at coordinates p; layers cover each other in turn."""
    x, y, z = p
    n, step = x.shape[0], WIDTH / x.shape[0]
    soft = max(2.0, step)                                            # mm over which a border runs
    brain = draw_outline(p)
    shell = np.maximum(ball(p, (0, -4, 2), (75, 92, 78)), _column(p, (0, -20), (54, 62), -18))
    fluid_gap = rng.uniform(2.0, 4.5)
    layers = [('scalp', shell), ('bone', shell - rng.uniform(4.5, 6.5))]
    layers += [('muscle', _column(p, (0, -20), (48, 54), -42)), ('fluid', brain + fluid_gap)]

    folds, depth = smooth_field(rng, 15, n), rng.uniform(12, 17)
    slope = np.sqrt(sum(g * g for g in np.gradient(folds, np.float32(step))))
    sulcus = np.abs(folds) / np.maximum(slope, 0.05)                 # mm to the middle of the nearest furrow
    reach = sulcus + np.clip(brain - depth, 0, None) * 1.2           # furrows end at some depth
    # Between the halves a furrow goes down to the corpus callosum, in front of and behind it further.
    middle = np.abs(x) + 2.0 * np.clip(ball(p, (0, -2, 10), (99, 46, 20)) + 6, 0, None)
    reach = np.where(z > -28, np.minimum(reach, middle), 99)
    ribbon = rng.uniform(4.0, 5.0)                                   # thickness of the cortex
    wide = rng.uniform(0.4, 1.1)                                     # half of a furrow: more with age
    layers += [('grey', np.minimum(brain, reach - wide)),
               ('white', np.minimum(brain - ribbon, reach - wide - ribbon))]

    cerebellum = ball(p, (0, -46, -38), (46, 26, 20))
    leaves = 2.2 * np.sin(np.float32(2 * np.pi / 9) * (z + 0.4 * y) + 0.05 * np.abs(x))
    layers += [('fluid', cerebellum + 2.5), ('grey', cerebellum), ('white', cerebellum - 8 + leaves)]
    layers += [('white', _stem(p))]

    side = np.abs(x)
    wing = (side, y, z)
    layers += [('nuclei', ball(wing, (26, 3, 2), (7, 18, 13))),                    # putamen and pallidum
               ('nuclei', ball(wing, (11, -16, 5), (9, 14, 9))),                   # thalamus
               ('nuclei', ball(wing, (14, 18, 10), (6, 13, 9))),                   # caudate
               ('fluid', draw_ventricles(p, rng)),
               ('fluid', ball(wing, (31, 70, -26), (12, 12, 12)))]                 # eyes

    shares = {name: np.zeros_like(x) for name in TISSUES}
    for name, depth in layers:
        cover(shares, name, edge(depth, soft))
    return shares


def draw_outline(p: np.ndarray) -> np.ndarray:
    """Depth in mm below the surface of the cerebrum, flat at its base."""
    x, y, z = p
    dome = ball(p, *CEREBRUM)
    base = z + 30 - 0.10 * np.clip(y, 0, None) - 0.0035 * (np.abs(x) - 30) ** 2
    return np.minimum(dome, base)


def draw_ventricles(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depth in mm inside the lateral and the third ventricle, of random size."""
    x, y, z = np.abs(p[0]), p[1], p[2]
    size = rng.normal(0, 1.2)
    t = np.clip(y, -38, 30)                                          # along the body, from the rear horn
    arch_x, arch_z = 9 + 0.010 * (t - 8) ** 2, 17 - 0.009 * (t - 6) ** 2
    body = np.sqrt((x - arch_x) ** 2 + ((z - arch_z) * 0.8) ** 2 + (y - t) ** 2)
    lateral = rng.normal(6.0, 0.6) + size - 0.05 * np.abs(t) - body
    third = np.minimum(2.2 + 0.4 * size - x, np.minimum(12 - np.abs(y + 6), 9 - np.abs(z + 2)))
    return np.maximum(lateral, third)


def _stem(p: np.ndarray) -> np.ndarray:
    """Depth in mm inside the brain stem, which runs down and back."""
    x, y, z = p
    radius = np.sqrt(x ** 2 + (y + 22 - 0.12 * (z + 20)) ** 2)
    return np.minimum(12 + 4 * np.exp(-((z + 34) / 10) ** 2) - radius, -8 - z)


def _column(p: np.ndarray, centre: tuple[float, float], radii: tuple[float, float], top: float
            ) -> np.ndarray:
    """Depth in mm inside an upright column below the height `top`."""
    x, y, z = p
    distance = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    return np.minimum((1 - distance) * min(radii), top - z)


def cover(shares: dict[str, np.ndarray], name: str, share: np.ndarray) -> None:
    """Puts a tissue over the others: it takes `share` of each voxel, they keep the rest."""
    for other in shares.values():
        other *= 1 - share
    shares[name] += share


# ---------------------------------------------------------------------------------------------------- lesions

def draw_hyperintensities(p: np.ndarray, white: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shares (N, N, N) of lesions: caps and spots around the ventricles, in white matter alone."""
    step = WIDTH / p.shape[1]
    near = np.flatnonzero((white > 0.9) & (ball(p, (0, -4, 14), (42, 58, 30)) > 0))
    lesion = np.zeros_like(white)
    for place in rng.choice(near, rng.integers(4, 13)):
        centre = p.reshape(3, -1)[:, place]
        radii = rng.uniform(3.0, 8.0) * rng.uniform(0.7, 1.4, 3)
        lesion = np.maximum(lesion, edge(ball(p, tuple(centre), tuple(radii)), max(2.0, step)))
    return lesion * np.clip(white * 1.5, 0, 1)


def draw_mass(rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Where a tumour is, the radius of its core and the width of the oedema around it, mm."""
    centre = np.full(3, 99, np.float32)
    while ball(centre, *CEREBRUM) < 20:                              # mm: deep enough for all of it
        side = rng.choice([-1, 1])
        centre = np.array([side * rng.uniform(22, 40), rng.uniform(-42, 36), rng.uniform(2, 34)], np.float32)
    return centre, rng.uniform(9, 17), rng.uniform(5, 11)


def pushed(p: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """The coordinates at which a head with a mass shows what the healthy one shows.

    A ball of 0.85 `radius` grows from nothing in tissue that keeps its volume: what lies at distance r came
    from (r^3 - grown^3)^(1/3). The effect fades towards the skull, which stays.
    """
    away = p - centre[:, None, None, None]
    r = np.maximum(np.sqrt((away ** 2).sum(0)), 1e-3)
    grown = np.float32(0.85 * radius)
    came_from = np.cbrt(np.clip(r ** 3 - grown ** 3, 0, None))
    fade = np.clip(ball(p, *CEREBRUM) / 18, 0, 1)
    return p - away / r * ((r - came_from) * fade)


# ---------------------------------------------------------------------------------------------------- volumes

def render(seed: int, class_name: str, index: int, size: int = SIZE, lesion: bool = True
           ) -> tuple[np.ndarray, np.ndarray]:
    """Phantom `index` of a class: (T1 and FLAIR (2, N, N, N) float32 in [0, 1], mask (N, N, N) bool).

    It is a function of the arguments alone. `lesion` False draws the same phantom in health: same anatomy,
    bias field and noise.
    """
    key = [seed, CLASS_NUMBER[class_name], index]
    body, ill, machine = (np.random.default_rng([*key, part]) for part in range(3))
    p = coordinates(body, size)
    mask = np.zeros((size,) * 3, bool)
    if class_name == TUMOUR and lesion:
        centre, radius, width = draw_mass(ill)
        ragged = 0.10 * radius * smooth_field(ill, 14, size)
        depth = ball(p, tuple(centre), (radius,) * 3) + ragged
        shares = draw_head(pushed(p, centre, radius), body)
        tissue = shares['white'] + 0.4 * (shares['grey'] + shares['nuclei'])    # oedema spares grey matter
        oedema = edge(depth + width + ragged, 4.0) * tissue
        core = edge(depth, max(2.0, WIDTH / size)) * (1 - shares['bone'] - shares['scalp'])
        cover(shares, 'oedema', oedema)
        cover(shares, 'core', core)
        cover(shares, 'fluid', 0.75 * edge(depth - 0.55 * radius, 4.0))                # dead tissue inside
        mask = np.maximum(oedema, core) > 0.5
    else:
        shares = draw_head(p, body)
        if class_name == HYPERINTENSITIES and lesion:
            spots = draw_hyperintensities(p, shares['white'], ill)
            cover(shares, 'lesion', spots)
            mask = spots > 0.5
    return np.stack([_scan(shares, channel, machine, size) for channel in range(2)]), mask


def _scan(shares: dict[str, np.ndarray], channel: int, rng: np.random.Generator, n: int) -> np.ndarray:
    """The image that a scanner makes of the tissues: (N, N, N) in [0, 1]."""
    image = sum(share * np.float32(TISSUES[name][channel] * rng.normal(1, 0.03))
                for name, share in shares.items())
    image *= 1 + 0.05 * smooth_field(rng, 10, n)                     # no tissue is even
    image = gaussian_filter(image, rng.uniform(0.35, 0.55) * n / SIZE)
    image *= np.exp(rng.uniform(0.05, 0.16) * smooth_field(rng, 150, n))               # coils' bias field
    noise = rng.standard_normal((2, n, n, n), np.float32) * np.float32(rng.uniform(0.012, 0.028))
    return np.clip(np.hypot(image + noise[0], noise[1]), 0, 1).astype(np.float32)      # Rician


# ------------------------------------------------------------------------------------------------------ files

def write_brain_phantoms(folder: str | Path, normal: int, seed: int = 0, size: int = SIZE) -> Path:
    """Writes `normal` healthy phantoms and an eighth as many, at least one, of each ill class; returns their
    folder, in the layout of readers/volumes/subjects.py. Raises UserError where it cannot be written.
    """
    if normal < 1:
        raise UserError(f"--num_phantoms {normal}: expected 1 or more.")
    ill = max(1, normal // 8)
    counts = {NORMAL: normal, HYPERINTENSITIES: ill, TUMOUR: ill}
    parameters = {**counts, 'seed': seed, 'size': size, 'version': VERSION}
    root = Path(folder) / f'synthetic-{normal}-{ill}-{size}-seed{seed}-v{VERSION}'
    write = partial(_write, seed=seed, size=size)
    # The first modality is written last: where it is, all of the subject is.
    files = {f'{name}/{MODALITIES[0]}/{name}-{i:05d}.nii.gz': partial(write, name=name, index=i)
             for name, number in counts.items() for i in range(number)}
    return write_set(root, parameters, NOTE.format(normal=normal, lesions=ill, tumours=ill), files)


def _write(path: Path, seed: int, name: str, index: int, size: int) -> None:
    channels, mask = render(seed, name, index, size)
    images = {LABELS: mask} if name != NORMAL else {}
    images |= dict(zip(reversed(MODALITIES), np.rint(channels[::-1] * 255), strict=True))
    affine = np.diag([WIDTH / size] * 3 + [1.0])
    affine[:3, 3] = (WIDTH / size - WIDTH) / 2                       # of the first voxel; 0 is the middle
    for folder, values in images.items():
        write_nifti(path.parents[1] / folder / path.name, values.astype(np.uint8), affine)
