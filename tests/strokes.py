"""Handwriting that says nothing: random brush strokes, as pictures that a model of digits has never seen.

    python tests/strokes.py FOLDER --count 1000 --strokes 4      as dense as cursive Japanese letters
    python tests/strokes.py FOLDER --count 1000 --strokes 1      simpler than any digit but a 1
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE, FINE = 28, 8          # pixels; the pen draws that many times finer
MARGIN = 0.14               # of the picture, empty as around MNIST's digits
POINTS = np.linspace(0, 1, 24)[:, None]


def curve(rng: np.random.Generator) -> np.ndarray:
    """Points (24, 2) of a quadratic Bezier curve within the margins, in units of the picture."""
    a, b, c = MARGIN + (1 - 2 * MARGIN) * rng.random((3, 2))
    return (1 - POINTS) ** 2 * a + 2 * POINTS * (1 - POINTS) * b + POINTS ** 2 * c


def draw(strokes: int, rng: np.random.Generator) -> np.ndarray:
    """White strokes on black, (28, 28) uint8, with the grey edges of a pen."""
    picture = Image.new('L', (SIZE * FINE, SIZE * FINE))
    pen = ImageDraw.Draw(picture)
    width = rng.uniform(1.8, 3.0) * FINE
    for _ in range(strokes):
        points = curve(rng) * SIZE * FINE
        pen.line([tuple(p) for p in points], fill=255, width=round(width), joint='curve')
        for x, y in points[[0, -1]]:                                # round ends
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def write_strokes(folder: Path, count: int, strokes: int, seed: int = 0) -> Path:
    """`count` PNG files in `folder`, the same for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, strokes])
    for i in range(count):
        Image.fromarray(draw(strokes, rng)).save(folder / f'{i:05d}.png')
    return folder


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--count', type=int, default=1000, help='pictures')
    parser.add_argument('--strokes', type=int, default=4, help='strokes a picture')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    print(write_strokes(args.folder, args.count, args.strokes, args.seed))
