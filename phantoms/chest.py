"""SYNTHETIC frontal chest radiographs, drawn by formulas: normal, and with COVID-like opacities and exact
masks.

Nothing here comes from a patient. Coordinates as on the screen: u from -1 left to 1 right (the patient's
left), v from -1 top to 1 bottom. The drawing adds up attenuation A (soft tissue in mid-chest about 1, air 0,
bright where large); a display curve, blur and quantum noise make an image of it. N x N pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.ndimage import gaussian_filter, map_coordinates

from phantoms.files import write_png, write_set
from phantoms.shapes import broad_blur, dome, ellipse, ramp, smooth_noise
from utils import UserError, write_csv

SIZE = 128                 # pixels; formulas are in units of the image, blur and noise in pixels at this size
VERSION = 3                # raise it when the drawing changes: phantoms of another version are then made anew
NORMAL, FAINT, MODERATE, MARKED = CLASSES = 'Normal', 'Faint', 'Moderate', 'Marked'
# Rise of the displayed image by the opacities, on average over their mask, of a range of 1. The borders are
# near the terciles that opacities of one range of attenuation have.
VISIBILITIES = {FAINT: (0.09, 0.15), MODERATE: (0.15, 0.20), MARKED: (0.20, 0.30)}
LEAST_RISE = 8 / 255       # a lesion is a connected region that rises by more
# What differs in the acquisition of images with lesions, added to the values of normal ones.
CONFOUNDS = {'none': {}, 'exposure': {'center': -0.09}, 'noise': {'noise': 0.006}}
NOTE = """SYNTHETIC IMAGES. No radiographs: a program drew them from random numbers.

Normal/images       {normal} phantoms of a healthy chest
Faint, Moderate,    {lesions} each with ground-glass-like opacities in both lungs, outer and low; they
Marked/images       brighten their masks by 0.09 to 0.15, to 0.20 and to 0.30 of the range of gray levels
*/masks             white where an opacity adds more than half of the most that it adds anywhere
lesions.csv         of each of these images the mean rise in the mask, and the area of the mask in pixels

Acquisition that differs between images with and without lesions: {confound}.

They are of use for demonstrations and tests, and say nothing about how well a method works on patients.
"""


# ---------------------------------------------------------------------------------------------------- anatomy

@dataclass(frozen=True)
class Chest:
    """The geometry of one chest on the screen's raster."""
    u: np.ndarray                  # (N, N) across the body, 0 on the spine
    v: np.ndarray                  # (N, N) down the body
    cage: np.ndarray               # (N, N) half width of the rib cage at this height
    base: np.ndarray               # (N, N) height v of the diaphragm in this column
    apex: float                    # height v of the lungs' upper ends
    lung: np.ndarray               # (N, N) thickness of lung in the beam, 0 to 1
    heart: np.ndarray              # (N, N) thickness of heart, 0 to 1


def build_chest(rng: np.random.Generator, n: int) -> Chest:
    """A chest of random size, tilt, breath and shape."""
    axis = np.linspace(-1, 1, n, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    tilt, zoom, slim = rng.normal(0, 0.03), rng.normal(1.0, 0.05), rng.normal(1.0, 0.05)
    shift_x, shift_y = rng.normal(0, 0.04), rng.normal(0, 0.04)
    c, s = np.float32(np.cos(tilt) / zoom), np.float32(np.sin(tilt) / zoom)
    u = (c * (x - np.float32(shift_x)) + s * (y - np.float32(shift_y))) * np.float32(slim)
    v = c * (y - np.float32(shift_y)) - s * (x - np.float32(shift_x))
    u = u + 0.012 * smooth_noise(rng, n / 8, n)                   # nobody is symmetric
    v = v + 0.012 * smooth_noise(rng, n / 8, n)

    apex, breath = rng.normal(-0.80, 0.025), rng.normal(0.50, 0.06)
    right_higher = rng.normal(0.05, 0.025)                     # the liver lifts the patient's right diaphragm
    width = rng.normal(0.76, 0.025)
    height = np.clip((v - apex) / (breath + 0.25 - apex), 0, 1)
    cage = width * (1 - (1 - height) ** rng.uniform(2.2, 2.8)) ** np.float32(0.50) * (0.88 + 0.12 * height)
    side = np.abs(u) / width                                      # 0 spine, 1 wall
    curve = rng.uniform(0.20, 0.30)
    outward = np.clip(side - 0.45, -0.4, None)                   # each dome falls off from here to both sides
    base = breath - right_higher * ramp(-u, 0.15) + curve * outward ** 2 * (1.2 + 2 * (outward > 0))

    lean = rng.uniform(0.45, 0.75)
    radii = (rng.normal(0.40, 0.035), rng.normal(0.27, 0.02))
    centre = (rng.normal(0.13, 0.02), breath - 0.13 + rng.normal(0, 0.02))
    heart = dome(np.minimum(ellipse(u, v, centre, radii, lean), 1))

    middle = 0.11 + 0.05 * ramp(v - 0.05, 0.5) + 0.03 * ramp(-0.62 - v, 0.2)   # half width of the mediastinum
    wall, inner, floor = cage - np.abs(u), np.abs(u) - middle, base - v
    lung = ramp(wall, 0.035) * ramp(inner, 0.07) * ramp(floor, 0.03)
    lung *= 0.62 + 0.38 * np.clip(wall / 0.22, 0, 1) ** 0.7                        # thinner towards the wall
    lung *= 0.75 + 0.25 * np.clip((v - apex) / 0.35, 0, 1)                         # and towards the apex
    lung *= 1 - 0.82 * np.clip(heart * 1.4, 0, 1)
    return Chest(u, v, cage, base, apex, lung, heart)


def draw_tissue(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of muscle, fat, heart, vessels' trunk, airways and abdomen, with the lungs taken out."""
    u, v = chest.u, chest.v
    shoulder = np.clip((v + 1.02) / rng.uniform(0.36, 0.52), 0, 1)
    outline = 0.30 + rng.normal(0.80, 0.07) * shoulder ** 0.60 - 0.10 * np.clip(v + 0.2, 0, 1)
    inside = np.clip(np.abs(u) / outline, 0, 1.3)
    body = np.clip(1 - inside ** 2.6, 0, None) ** 0.55 * ramp(1.0 - inside, 0.04)
    body *= 0.80 + 0.12 * ramp(v + 0.75, 0.5) + 0.10 * ramp(v - 0.1, 0.8)
    a = body - rng.normal(0.64, 0.02) * chest.lung * body
    below = ramp(v - chest.base, 0.03) * body
    a += rng.normal(0.22, 0.03) * below
    middle = np.exp(-(u / 0.16) ** 2) * body
    a += 0.14 * middle + rng.normal(0.20, 0.04) * chest.heart ** 0.8
    knob = (rng.normal(0.125, 0.015), rng.normal(-0.30, 0.025))                    # aortic arch
    a += 0.22 * dome(np.minimum(ellipse(u, v, knob, (0.10, 0.095)), 1)) * ramp(u - 0.03, 0.05)
    a += 0.10 * ramp(0.135 - np.abs(u - 0.03), 0.05) * ramp(v - knob[1], 0.1) * ramp(0.2 - v, 0.2)
    windpipe = np.exp(-((u + 0.01) / 0.035) ** 2) * ramp(-0.22 - v, 0.08)
    a -= rng.normal(0.15, 0.03) * windpipe * body
    for side in (-1, 1):                                                           # main bronchi
        line = u - side * np.clip(v + 0.22, 0, None) * 0.9
        a -= 0.09 * np.exp(-(line / 0.028) ** 2) * ramp(v + 0.25, 0.05) * ramp(-0.06 - v, 0.06)
    gas = (rng.normal(0.36, 0.06), float(np.median(chest.base)) + rng.normal(0.17, 0.03))  # stomach's air
    bubble = ellipse(u, v, gas, (rng.uniform(0.08, 0.2), rng.uniform(0.04, 0.10)))
    a -= max(0.0, rng.normal(0.05, 0.2)) * np.exp(-bubble ** 1.5) * below
    bust = max(0.0, rng.normal(0.04, 0.07))
    for side in (-1, 1):                                          # breasts: brighter, with a lower edge
        d = ellipse(u, v, (side * 0.46, rng.normal(0.34, 0.04)), (0.34, rng.uniform(0.26, 0.36)))
        a += bust * dome(np.minimum(d, 1)) * body
    return np.clip(a, 0, None)


def draw_bones(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of spine, ribs, clavicles, shoulder blades and upper arms."""
    u, v = chest.u, chest.v
    side = np.abs(u)
    pitch, phase = rng.normal(0.138, 0.006), rng.uniform(0, 2 * np.pi)         # one vertebra and one rib each
    spine = ramp(0.078 - side, 0.03) * (1 + 0.28 * np.cos(2 * np.pi * v / pitch + phase))
    spine += 0.3 * np.exp(-(u / 0.018) ** 2)
    bone = rng.normal(0.075, 0.02) * spine

    rib = np.zeros_like(u)
    span = side / np.maximum(chest.cage, 0.05)                                     # 0 spine, 1 wall
    fall, arch = rng.normal(0.20, 0.03), rng.normal(0.10, 0.02)
    front_fall, front = rng.normal(0.30, 0.04), rng.uniform(0.25, 0.5)
    half = rng.normal(0.031, 0.003)
    reach = ramp(1.10 - span, 0.06)
    low = float(np.median(chest.base)) + 0.30
    for k in range(11):
        start = chest.apex + 0.06 + k * pitch * rng.normal(1.0, 0.01)
        if start > low:
            break
        back = start - arch * np.sin(np.pi * np.clip(span, 0, 1) * 0.9) + fall * np.clip(span, 0, 1.2) ** 3
        rib += _tube((v - back) * (0.80 + 0.2 * span), half) * ramp(side - 0.09, 0.04) * reach
        if k >= 1:                                                       # front ends: wider, fainter, steeper
            ahead = start + 0.10 + front_fall * (1 - np.clip(span, 0, 1)) ** 0.8
            begins = ramp(span - rng.normal(0.42, 0.03), 0.12)
            rib += front * _tube((v - ahead) * 0.85, half * 1.25) * begins * reach
    bone += rng.normal(0.125, 0.02) * rib * ramp(v - chest.apex, 0.06)

    slope, height = rng.normal(0.28, 0.06), chest.apex + rng.normal(0.23, 0.025)
    collar = height - slope * (side - 0.1) + 0.05 * np.sin(np.clip(side - 0.08, 0, 0.75) / 0.75 * 2 * np.pi)
    collarbone = _tube(v - collar, 0.032) * ramp(side - 0.09, 0.03) * ramp(0.80 - side, 0.06)
    bone += rng.normal(0.19, 0.03) * collarbone

    blade = rng.normal(0.72, 0.05)
    edge = blade - 0.10 * np.clip(v + 0.3, -0.5, 0.5)
    shoulder_blade = ramp(side - edge, 0.03) * ramp(edge + 0.22 - side, 0.1)
    shoulder_blade *= ramp(0.05 - v, 0.1) * ramp(v + 0.62, 0.1)
    bone += rng.uniform(0.02, 0.12) * shoulder_blade
    joint, down = (rng.normal(0.96, 0.03), chest.apex + 0.33), rng.uniform(0.10, 0.35)        # upper arm
    head = np.exp(-ellipse(side, v, joint, (0.10, 0.12)) ** 3)
    shaft = ramp(0.055 - np.abs(side - joint[0] - down * (v - joint[1]) - 0.02), 0.03)
    shaft *= ramp(v - joint[1] - 0.05, 0.08)
    return bone + rng.normal(0.10, 0.03) * np.maximum(head, shaft)


def _tube(d: np.ndarray, half: float) -> np.ndarray:
    """A bone across its length, at distance d from the axis: dense cortex at the edges, lighter inside."""
    r = np.clip(np.abs(d) / half, 0, 2.5)
    return np.exp(-r ** 4) * (0.62 + 0.55 * r * r)


def draw_vessels(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Lung vessels: trees that leave the hila, split and thin out; and the fine texture of the lung."""
    n = len(chest.u)
    layers = np.zeros((3, n, n), np.float32)
    position, heading, order = [], [], []
    for side in (-1, 1):
        hilum = np.array([side * 0.17, -0.06 + 0.03 * side], np.float32)
        angles = np.linspace(-1.35, 1.45, 9) + rng.normal(0, 0.10, 9)
        position += [hilum] * 9
        heading += [np.arctan2(np.sin(a), side * np.cos(a)) for a in angles]
        order += [0.0] * 9
    p, h, o = np.array(position), np.array(heading), np.array(order)
    for step in range(44):                                                         # all branches grow at once
        h = h + rng.normal(0, 0.07, len(h))
        p = p + 0.016 * np.stack([np.cos(h), np.sin(h)], 1)
        weight = np.exp(-0.045 * step) * 0.72 ** o
        _splat(layers, p, weight)
        if step % 6 == 3 and len(p) < 420:
            split = rng.random(len(p)) < 0.62
            turn = rng.choice([-1, 1], split.sum()) * rng.uniform(0.35, 0.75, split.sum())
            p, h = np.concatenate([p, p[split]]), np.concatenate([h, h[split] + turn])
            o = np.concatenate([o + split * 0.5, o[split] + 1.0])
        alive = (np.abs(p) < 1).all(1)
        p, h, o = p[alive], h[alive], o[alive]
    widths = (1.7, 1.05, 0.7)                                                      # pixels at SIZE
    tree = sum(gaussian_filter(layer, w * n / SIZE) * w for layer, w in zip(layers, widths, strict=True))
    hila = sum(np.exp(-ellipse(chest.u, chest.v, (s * 0.19, -0.05 + 0.03 * s), (0.09, 0.15), 0.3 * s))
               for s in (-1, 1))
    texture = smooth_noise(rng, 1.2 * n / SIZE, n) * 0.5 + smooth_noise(rng, 3.0 * n / SIZE, n) * 0.5
    tree = _on_screen(tree, chest)
    lung = np.clip(chest.lung * 1.3, 0, 1)
    strength, glow = rng.normal(0.21, 0.04), rng.normal(0.17, 0.04)
    return lung * (strength * np.tanh(tree * 1.3) + glow * hila + 0.012 * texture)


def _splat(layers: np.ndarray, p: np.ndarray, weight: np.ndarray) -> None:
    """Adds points p (n, 2) of width `weight` to three layers (3, N, N), thick, middle and thin."""
    n = layers.shape[1]
    column, row = np.clip(((p + 1) / 2 * (n - 1)).round().astype(int), 0, n - 1).T
    thickness = np.digitize(-weight, [-0.45, -0.20])                               # 0 thick, 1 middle, 2 thin
    np.add.at(layers, (thickness, row, column), 0.35 + weight)


def _on_screen(image: np.ndarray, chest: Chest) -> np.ndarray:
    """A picture in the body's coordinates (u, v), as the tilted and warped body shows it on the screen."""
    n = len(image)
    return map_coordinates(image, [(chest.v + 1) / 2 * (n - 1), (chest.u + 1) / 2 * (n - 1)], order=1)


# -------------------------------------------------------------------------------------------------- opacities

def draw_opacities(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of ground-glass opacities, at most about 1: in both lungs, near the wall and low,
    soft-edged.
    """
    n = len(chest.u)
    shape, edge = np.zeros_like(chest.u), smooth_noise(rng, 4.5 * n / SIZE, n)
    for side in (-1, 1):
        for _ in range(rng.integers(1, 5)):
            top, bottom = chest.apex + 0.25, float(np.median(chest.base)) - 0.02
            height = top + (bottom - top) * rng.beta(3.0, 1.3)                     # mostly the lower zones
            row = int(np.clip((height + 1) / 2 * (n - 1), 0, n - 1))
            wall = float(np.median(chest.cage[row]))
            centre = (side * (wall - abs(rng.normal(0.08, 0.09))), height)         # mostly at the wall
            size = rng.uniform(0.09, 0.22)
            radii = (size * rng.uniform(0.6, 1.0), size * rng.uniform(0.8, 1.4))
            d = ellipse(chest.u, chest.v, centre, radii, rng.normal(0, 0.4))
            ragged = 0.38 * np.roll(edge, rng.integers(0, n, 2), (0, 1))
            shape = np.maximum(shape, rng.uniform(0.6, 1.0) * ramp(1.0 - np.sqrt(d) + ragged, 0.9) * (d < 6))
    lacy = 1 + 0.20 * smooth_noise(rng, 2.4 * n / SIZE, n) + 0.10 * smooth_noise(rng, 1.1 * n / SIZE, n)
    return shape * np.clip(lacy, 0.2, 2) * np.clip(chest.lung * 1.25, 0, 1)


def half_maximum(rise: np.ndarray) -> np.ndarray:
    """Mask (N, N) bool of the lesions that make an image rise by `rise` (N, N): the pixels of each connected
    region above LEAST_RISE that rise by more than half of the region's maximum.
    """
    regions, number = ndimage.label(rise > LEAST_RISE)
    peaks = np.full(number + 1, np.inf)                                            # region 0 is the rest
    peaks[1:] = ndimage.maximum(rise, regions, range(1, number + 1))
    return rise > peaks[regions] / 2


def set_visibility(rise_of: Callable[[float], np.ndarray], least: float, most: float,
                   rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rise (N, N) and mask (N, N) bool of opacities of random strength whose mean rise in the mask is from
    `least` to `most`. `rise_of` gives the rise of a strength, to which it is about proportional.
    """
    target = rng.uniform(least, most)
    strength = 2 * target
    for _ in range(20):
        rise = rise_of(strength)
        mask = half_maximum(rise)
        mean = rise[mask].mean()
        if least <= mean <= most:
            break
        strength *= target / mean
    return rise, mask


# ---------------------------------------------------------------------------------------------------- display

@dataclass(frozen=True)
class Machine:
    """Exposure, film and noise of one radiograph."""
    center: float                  # attenuation that is displayed as medium gray
    contrast: float                # slope of the display curve
    range: tuple[float, float]     # displayed values of the thinnest and the thickest body
    haze: float                    # share of scattered radiation
    blur: float                    # standard deviation in pixels
    noise: np.ndarray              # (N, N) quantum noise

    def display(self, attenuation: np.ndarray) -> np.ndarray:
        """The image (N, N) of an attenuation (N, N), without noise."""
        scattered = broad_blur(attenuation, 0.09 * len(attenuation))
        sharp = gaussian_filter((1 - self.haze) * attenuation + self.haze * scattered, self.blur)
        low, high = self.range
        return low + (high - low) / (1 + np.exp(-self.contrast * (sharp - self.center)))

    def add_noise(self, image: np.ndarray) -> np.ndarray:
        """The image (N, N) float32 in [0, 1] with noise: fewer quanta where it is bright."""
        return np.clip(image + self.noise * np.sqrt(1.4 - image) * 1.6, 0, 1).astype(np.float32)


def draw_machine(rng: np.random.Generator, n: int, center: float = 0.0, noise: float = 0.0) -> Machine:
    """A machine with random settings; `center` and `noise` are added to these."""
    values = {'center': rng.normal(0.72, 0.06) + center, 'contrast': rng.uniform(3.6, 5.6),
              'range': (rng.uniform(0.0, 0.06), rng.uniform(0.90, 1.0)), 'haze': rng.uniform(0.10, 0.30),
              'blur': rng.uniform(0.45, 0.85) * n / SIZE}
    grain = gaussian_filter(rng.standard_normal((n, n), np.float32), 0.45)
    return Machine(**values, noise=grain * (rng.uniform(0.004, 0.016) + noise))


class Phantom(NamedTuple):
    """A drawn radiograph."""
    image: np.ndarray              # (N, N) float32 in [0, 1]
    mask: np.ndarray               # (N, N) bool, True in lesions
    rise: np.ndarray               # (N, N) what the lesions add to the displayed image

    @property
    def mean_rise(self) -> float:
        """Mean rise in the mask: how visible the lesions are. NaN without lesions."""
        return float(self.rise[self.mask].mean()) if self.mask.any() else float('nan')


def render(seed: int, class_name: str, index: int, size: int = SIZE, lesions: bool = True,
           confound: str = 'none') -> Phantom:
    """Phantom `index` of a class, a function of the arguments alone.

    Without `lesions` it is the same phantom without its opacities: same anatomy, exposure and noise.
    `confound`, one of CONFOUNDS, changes the acquisition of all classes but NORMAL.
    """
    key = [seed, CLASSES.index(class_name), index]
    body, lesion, machine = (np.random.default_rng([*key, part]) for part in range(3))
    chest = build_chest(body, size)
    a = draw_tissue(chest, body) + draw_bones(chest, body) + draw_vessels(chest, body)
    machine = draw_machine(machine, size, **CONFOUNDS[confound] if class_name != NORMAL else {})
    image = machine.display(a)
    rise, mask = np.zeros_like(image), np.zeros(image.shape, bool)
    if lesions and class_name != NORMAL:
        opacities = draw_opacities(chest, lesion)
        rise, mask = set_visibility(lambda strength: machine.display(a + strength * opacities) - image,
                                    *VISIBILITIES[class_name], lesion)
    return Phantom(machine.add_noise(image + rise), mask, rise)


# ------------------------------------------------------------------------------------------------------ files

def write_phantoms(folder: str | Path, normal: int, lesions: int | None = None, seed: int = 0,
                   confound: str = 'none') -> Path:
    """Writes `normal` healthy phantoms and `lesions` (a twelfth as many if None) of each class with lesions;
    returns their folder.

    Each set of numbers has a folder of its own below `folder`, so that another number never mixes with them.
    Raises UserError where the folder cannot be written.
    """
    lesions = max(1, normal // 12) if lesions is None else lesions
    if normal < 1:
        raise UserError(f"--num_phantoms {normal}: expected 1 or more.")
    parameters = {'normal': normal, 'lesions': lesions, 'seed': seed, 'confound': confound, 'size': SIZE,
                  'version': VERSION}
    suffix = '' if confound == 'none' else f'-{confound}'
    root = Path(folder) / f'synthetic-{normal}-{lesions}-seed{seed}-v{VERSION}{suffix}'

    def mask_of(path: Path) -> Path:
        return path.parent.parent / 'masks' / path.name

    def write(path: Path, class_name: str, index: int) -> None:
        phantom = render(seed, class_name, index, confound=confound)
        if class_name != NORMAL:                 # the mask first: where there is an image, all of it is there
            write_png(mask_of(path), phantom.mask, mean_rise=repr(phantom.mean_rise))
        write_png(path, phantom.image)

    def row(name: str, class_name: str) -> tuple[str, str, float, int]:
        with Image.open(mask_of(root / name)) as mask:
            return name, class_name.lower(), float(mask.text['mean_rise']), int((np.asarray(mask) > 0).sum())

    def write_table() -> None:
        write_csv(root / 'lesions.csv', ('file', 'visibility', 'mean_rise', 'area'),
                  (row(name, class_name) for name, (class_name, _) in places.items() if class_name != NORMAL))

    counts = {NORMAL: normal, **dict.fromkeys(VISIBILITIES, lesions)}
    places = {f'{name}/images/{name}-{i:05d}.png': (name, i)
              for name, number in counts.items() for i in range(number)}
    files = {name: partial(write, class_name=class_name, index=i) for name, (class_name, i) in places.items()}
    return write_set(root, parameters, NOTE.format(**parameters), files, write_table)
