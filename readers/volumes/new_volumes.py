"""Volumes of any folder, without classes or labels, made ready for a model as its own data were.

C channels, *S = (D, H, W) voxels of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributions import Pixels
from readers.images.new_files import Found, Loaded, as_batch, printable
from readers.parts import Batch
from readers.source import Unreadable
from readers.volumes.nifti import read_nifti
from readers.volumes.subjects import AUTO, Subject, find_subjects, owner, volume_files
from readers.volumes.volumes import VolumePreparation
from utils import UserError


@dataclass(frozen=True)
class NewVolumes:
    """What a run does to a subject before its model of `shape` (C, *S) sees it: for those that are not in its
    data set. `modalities` and `labels` are the names of files as in the run; labels are not read.
    """
    shape: tuple[int, ...]
    pixels: Pixels
    prepared: VolumePreparation
    modalities: tuple[str, ...]
    labels: str
    dequantize: bool = False
    invert: bool = False

    def find(self, path: str | Path, without: str | Path = '') -> Found:
        """The subjects below a folder as in training, but for the folder `without`; or the one of a file.
        Raises UserError if there is none, or if one file is too few.
        """
        root, body = Path(path), '' if self.prepared.body == AUTO else self.prepared.body
        names = [*self.modalities, *(name for name in (self.labels, body) if name)]
        if not root.exists():
            raise UserError(f"--data: {root} does not exist. Give a folder of NIfTI files, or one file.")
        if not root.is_dir():
            self._expect_all_in(root, body)
            return Found([printable(owner(root.name, names)[0])], [Subject(root.name, (str(root),))], 0)
        subjects, bad = find_subjects(root, self.modalities, self.labels, body, without)
        found = sorted([(s.id, s) for s in subjects] + [(name, Unreadable(why)) for name, why in bad],
                       key=lambda pair: pair[0])
        ids = {name for name, _ in found}
        others = sum(owner(file, names)[0] not in ids for file in volume_files(root, without))
        return Found([printable(name) for name, _ in found], [subject for _, subject in found], others,
                     "NIfTI files that are no channel of the run's")

    def _expect_all_in(self, file: Path, body: str) -> None:
        """Raises UserError if a subject is more than one such file; whether that can be read shows later."""
        if body:
            raise UserError(f"--data {file}: the run keeps what is inside the mask {body!r} of each subject "
                            f"(--volume_mask). Give the folder that holds both files.")
        try:
            found = len(read_nifti(file).values) if len(self.modalities) > 1 else 1
        except Unreadable:
            return
        if found == 1 < len(self.modalities):
            raise UserError(f"--data {file} has 1 channel, the model takes {len(self.modalities)} "
                            f"({', '.join(self.modalities)}): give the folder that holds a file of each.")

    def load(self, subject: Subject | Unreadable) -> Loaded:
        """A subject at the shape of the model. Raises Unreadable."""
        if isinstance(subject, Unreadable):
            raise subject
        outline = self.prepared.outline(subject)
        shape = self.shape[1:]
        volume = self.prepared.load(subject, outline.centred(shape))
        cut = ['larger than the model sees lose their ends'] if any(
            have > kept for have, kept in zip(outline.shape, shape, strict=True)) else []
        return Loaded(volume.pixels, (volume.grid, volume.own), (*volume.repairs, *cut))

    def batch(self, volumes: Sequence[Loaded], ids: Sequence[str]) -> Batch:
        """Volumes that `load` gave, as the run's own."""
        return as_batch(volumes, ids, self.pixels, self.prepared.depth, dequantize=self.dequantize,
                        invert=self.invert)
