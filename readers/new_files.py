"""New files, without classes or labels, made ready for a model by the functions that read its own data.

B images, C channels, *S pixels or voxels as the model sees them, border included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distributions import Pixels
from readers.items import Loaded
from readers.parts import Batch, Part, Transform
from readers.paths import Found
from readers.source import Entry, Source


class Loader(Protocol):
    """Loads images (ImageLoader) or volumes (VolumeLoader) in the shape of a model."""
    depth: int

    def find(self, path: str | Path, without: str | Path = '') -> Found: ...

    def load(self, place: Any) -> Loaded: ...


@dataclass(frozen=True)
class Preparation:
    """What a run does to an image or a subject before its model sees it."""
    loader: Loader
    transform: Transform

    @property
    def pixels(self) -> Pixels:
        return self.transform.pixels

    def find(self, path: str | Path, without: str | Path = '') -> Found:
        """The files or subjects below a folder but for `without`, or the one file. Raises UserError if there
        are none.
        """
        return self.loader.find(path, without)

    def load(self, place: Any) -> Loaded:
        """What `find` found at this place. Raises Unreadable."""
        return self.loader.load(place)

    def batch(self, loaded: Sequence[Loaded], ids: Sequence[str]) -> Batch:
        """What `load` gave, as the run's own in an evaluation; what is random follows from ids."""
        entries = [Entry(name, '', '', '', 0, row) for row, name in enumerate(ids)]
        source = Source(entries, np.stack([x.pixels for x in loaded]), None, (), ())
        return Part(entries, source, self.transform).items(range(len(entries)))

    def images(self, paths: Sequence[str | Path]) -> Batch:
        """Image files as a batch, as they would be in an evaluation of the run. Raises Unreadable."""
        return self.batch([self.load(str(path)) for path in paths], [Path(path).name for path in paths])
