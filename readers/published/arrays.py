"""Data sets that fit into memory and have parts of their own: arrays in, one cached array out.

N images of H x W as the files have them, C channels, S x S pixels as the model sees them, border included.
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from readers.cache import stamp
from readers.config import DataSet, ReaderConfig
from readers.images.decode import ImageLoader
from readers.images.png import png_bytes
from readers.items import Item, Listing, Loaded, import_items
from readers.published.records import MODES, to_array
from readers.source import Source
from utils import UserError

# {'train' or 'test': (images (N, H, W) or (N, H, W, 3) uint8, class names (N,))}
Parts = Mapping[str, tuple[np.ndarray, Sequence[str]]]


def read_arrays(config: ReaderConfig, row: DataSet, name: str, load: Callable[[], Parts],
                files: Sequence[Path], classes: Sequence[str]) -> Source:
    """The images of the chosen `classes` that `load()` gives, as (N, C, S, S) uint8.

    `load` runs only if the `files` it reads have changed since the arrays were cached.
    """
    loader = ImageLoader.of(config, row)
    key = {'arrays': name, 'files': [[str(path.resolve()), *stamp(path)] for path in files], **vars(loader)}

    def list_images() -> Listing:
        items = [Item(f'{part}/{i:05d}', class_name, part=part, read=lambda item, x=x: prepare(x, loader))
                 for part, (images, names) in load().items()
                 for i, (x, class_name) in enumerate(zip(images, names, strict=True))]
        return Listing(f'{name} in {files[0].parent}', items, loader.shape, classes, near_duplicates=False)

    return import_items(config, row, key, list_images)


def prepare(image: np.ndarray, loader: ImageLoader) -> Loaded:
    """An image (H, W) or (H, W, 3) uint8, resized if it does not fit into the border, gray by luma."""
    size, border = loader.size, loader.border
    x = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)                     # (1 or 3, H, W)
    num_bytes = png_bytes(x, optimize=False)
    if x.shape != (loader.channels, size, size):
        picture = Image.fromarray(image).convert(MODES[loader.channels])
        x = to_array(picture.resize((size, size), Image.Resampling.BILINEAR), loader.channels)
    pixels = np.pad(x, ((0, 0), (border, border), (border, border)))
    if loader.depth == 16:
        pixels = pixels.astype(np.uint16) * 257                                          # 255 becomes 65535
    return Loaded(pixels, None, hashlib.sha256(image.tobytes()).hexdigest(), num_bytes)


def find_files(config: ReaderConfig, row: DataSet, names: Sequence[str],
               folders: Sequence[str] = ('',)) -> list[Path]:
    """The files of these names in one of the `folders` below --data, packed with gzip or not.

    Raises UserError, which says where to get them, if one is missing.
    """
    if not config.data:
        raise UserError(f"--data is missing. {row.where}")
    for folder in folders:
        found = [next((p for p in (path, path.with_name(f'{path.name}.gz')) if p.is_file()), None)
                 for path in (Path(config.data, folder, name) for name in names)]
        if all(found):
            return found
    place = f'{folders[0]} with ' if folders[0] else ''
    raise UserError(f"--data: {config.data!r} has no {place}{', '.join(names)} (or the same with .gz). "
                    f"{row.where}")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked if its name ends in .gz. Raises UserError."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
