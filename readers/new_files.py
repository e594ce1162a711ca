"""New files, without classes or labels, made ready for a model by the functions that read its own data.

B images, C channels, *S pixels or voxels as the model sees them, border included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from readers.images.decode import ImageLoader
from readers.items import Loaded
from readers.parts import Batch, Part, Transform
from readers.source import Entry, Source
from readers.volumes.volumes import VolumeLoader


@dataclass(frozen=True)
class Preparation:
    """What a run does to an image or a subject before its model sees it."""
    loader: ImageLoader | VolumeLoader           # finds and loads files, in the shape of the model
    transform: Transform

    def batch(self, loaded: Sequence[Loaded], ids: Sequence[str]) -> Batch:
        """What the loader gave, as the run's own in an evaluation; what is random follows from ids."""
        entries = [Entry(name, '', '', '', 0, row) for row, name in enumerate(ids)]
        source = Source(entries, np.stack([x.pixels for x in loaded]), None, (), ())
        return Part(entries, source, self.transform).items(range(len(entries)))

    def images(self, paths: Sequence[str | Path]) -> Batch:
        """Image files as a batch, as they would be in an evaluation of the run. Raises Unreadable."""
        loaded = [self.loader.load(str(path)) for path in paths]
        return self.batch(loaded, [Path(path).name for path in paths])
