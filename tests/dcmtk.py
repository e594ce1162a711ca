"""pydicom's own test files, read or refused with the reason, beside what DCMTK shows of them.

    python tests/dcmtk.py [FILE ...]        needs dcmtk (Debian); FILEs in place of pydicom's

A line for the first and the last frame of a file. Ends with 1 if one differs by more than a gray level of 256
in the mean. Of big-endian files of 32 bits DCMTK swaps the words: three of pydicom's differ (rtdose_expb).
"""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pydicom
from PIL import Image
from pydicom.data import get_testdata_files

from readers.dicom import count_frames, decode_dicom, is_dicom
from readers.dicom_display import table_of, text
from readers.source import Unreadable

PROGRAMS = ('dcmj2pnm', 'dcml2pnm')               # JPEG, JPEG-LS; both read what is not compressed
MOST = 1.0                                        # gray level of 256, in the mean


def shown(path: Path, frame: int) -> np.ndarray | None:
    """What DCMTK shows by the first lookup table or window, or the range: (H, W) or (H, W, 3), 0 to 255."""
    dataset, look = pydicom.dcmread(path, force=True), []
    if text(dataset, 'PhotometricInterpretation').startswith('MONO'):
        window = dataset.get('WindowCenter') not in (None, '')
        by_table = table_of(dataset, 'VOILUTSequence', False)
        look = ['+Wl', '1'] if by_table else ['+Wi', '1'] if window else ['+Wm']
    with tempfile.NamedTemporaryFile(suffix='.pnm') as file:
        for program in PROGRAMS:
            words = [program, '-q', '--write-raw-pnm', '+F', str(frame + 1), *look, str(path), file.name]
            if subprocess.run(words, capture_output=True, timeout=60).returncode == 0:
                return np.asarray(Image.open(file.name), np.float64)
    return None


def compared(path: Path, frame: int, frames: int) -> tuple[str, bool]:
    """A line on a frame, and whether all is well with it."""
    theirs = shown(path, frame)
    try:
        ours = np.rint(decode_dicom(path.read_bytes(), frame if frames > 1 else None) * 255)
    except Unreadable as error:
        return f'{error}' + ' (DCMTK reads it)' * (theirs is not None), True
    if theirs is None:
        return f'read, {ours.shape}; DCMTK does not', True
    theirs = theirs.reshape(*theirs.shape[:2], -1)
    difference = np.abs(ours - theirs).mean() if theirs.shape[:2] == ours.shape[:2] else np.inf
    return f'read, {ours.shape}; from DCMTK {difference:.3f}', difference <= MOST


def main(paths: list[Path]) -> int:
    bad = 0
    for path in sorted(path for path in paths if path.is_file() and is_dicom(path.read_bytes())):
        frames = count_frames(path)
        for frame in sorted({0, frames - 1}):
            line, well = compared(path, frame, frames)
            bad += not well
            print('' if well else 'LOOK', path.parent.name, path.name, frame + 1, line, sep='\t', flush=True)
    print(f'{bad} to look at')
    return int(bad > 0)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    sys.exit(main([Path(p) for p in sys.argv[1:] or get_testdata_files()]))
