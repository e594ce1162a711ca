"""Small files that claim much memory, and pipes: each is refused at once, before anything is decoded."""

import gzip
import os
import struct
import time
import zlib

import bombs
import pytest
from bombs import BOMBS, packed, refusal
from PIL import Image
from test_datasets import as_bytes
from test_dicom import as_bytes as dicom_bytes
from test_dicom import made

from audit.headers import read_file_header
from readers import dicom
from readers.dicom import count_frames, decode_dicom
from readers.images.decode import ImageLoader
from readers.images.files import places
from readers.lmdb.file import is_lmdb
from readers.published import arrays
from readers.source import Unreadable
from readers.volumes.nifti import read_nifti, read_start
from storage import limits
from storage.arrays import read_npz
from storage.checkpoint import read_checkpoint
from utils import UserError, read_json, read_text

WORDS = ('GB of memory', 'unpacks to more', 'exhaust memory', 'too deep', 'holds more than')


@pytest.mark.parametrize('bomb', BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_bomb_is_refused_in_less_than_a_second_and_200_mb(bomb, tmp_path):
    if bomb.__name__.startswith('nifti'):
        pytest.importorskip('nibabel')
    told, seconds, megabytes = refusal(bomb, tmp_path / 'bomb')
    assert any(words in told for words in WORDS) and '\n' not in told, told
    assert seconds < 1 and megabytes < 200


def test_the_limit_can_be_raised(monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, '3')
    assert limits.excess(4 << 30) and not limits.excess(2 << 30) and limits.excess(2 << 30, held=1000)
    limits.allow(30)
    assert not limits.excess(4 << 30) and not limits.excess(2 << 30, held=1000)


def test_packed_data_are_unpacked_up_to_the_limit():
    whole = gzip.compress(b'a' * 1000) + gzip.compress(b'b' * 1000) + b'\0\0'
    assert limits.unpack(whole) == limits.unpack(whole, 2000) == b'a' * 1000 + b'b' * 1000
    assert limits.unpack(gzip.compress(b'')) == b''
    assert limits.unpack(packed(1, -15) + b'checksum', wbits=-15) == limits.unpack(packed(1, -15), wbits=-15)
    with pytest.raises(ValueError, match='more than 1,999 bytes'):
        limits.unpack(whole, 1999)
    for cut in (whole[:20], whole[:40]):
        with pytest.raises(EOFError):
            limits.unpack(cut)
    began = time.process_time()
    assert limits.unpack(gzip.compress(b'') * 50_000) == b'' and time.process_time() - began < 5, "not N^2"


def test_no_more_frames_are_counted_than_a_file_can_hold(tmp_path):
    count = b'acTL' + struct.pack('>2I', 10 ** 9, 0)
    picture = as_bytes(Image.new('L', (4, 4)))
    (tmp_path / 'a.png').write_bytes(
        picture[:33] + struct.pack('>I', 8) + count + struct.pack('>I', zlib.crc32(count)) + picture[33:])
    slices = made([[1, 2]])
    slices.NumberOfFrames = 10 ** 9
    (tmp_path / 'a.dcm').write_bytes(dicom_bytes(slices))
    for name in ('a.png', 'a.dcm'):
        (_, place), = places(str(tmp_path / name), 'each')
        with pytest.raises(Unreadable, match=r'cannot be decoded|damaged or cut off'):
            ImageLoader(4, 1, 8, frames='each').load(place)


def test_frames_of_a_deflated_bomb_are_not_counted(tmp_path):
    data = bombs.dicom(None).args[0]

    def count(path):
        path.write_bytes(data)
        return lambda: count_frames(path)
    assert refusal(count, tmp_path / 'a')[0] == '' and refusal(count, tmp_path / 'a').seconds < 1


def test_a_dicom_file_of_very_many_elements_is_refused(monkeypatch):
    """Empty items of a sequence, of 16 bytes each, with which pydicom is busy for 20 microseconds each."""
    whole = dicom_bytes(made([[1, 2]]))
    place = whole.index(b'\xe0\x7f\x10\0')
    item = bytes.fromhex('feff00e0 ffffffff feff0de0 00000000')
    sequence = bytes.fromhex('0052 3092') + b'SQ\0\0' + b'\xff' * 4
    many = whole[:place] + sequence + item * 1000 + bytes.fromhex('feffdde0 00000000') + whole[place:]
    assert decode_dicom(many).shape == (1, 2, 1)
    monkeypatch.setattr(dicom, 'MOST_READS', 1000)
    with pytest.raises(Unreadable, match='too many elements'):
        decode_dicom(many)
    monkeypatch.setattr(dicom, 'MOST_READS', 10 ** 6)
    monkeypatch.setattr(dicom, 'MOST_ITEMS', 999)
    with pytest.raises(Unreadable, match='too many elements'):
        decode_dicom(many)


@pytest.mark.parametrize('read', [
    read_json, read_text, read_npz, read_checkpoint, read_nifti, read_start, read_file_header, is_lmdb,
    arrays.read_idx], ids=lambda read: read.__name__)
def test_a_pipe_is_never_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    if read is is_lmdb:
        assert not is_lmdb(tmp_path / 'pipe')
        assert [*places(str(tmp_path / 'pipe'), 'each')] == [('', str(tmp_path / 'pipe'))]
        return
    with pytest.raises((UserError, Unreadable), match='a device or a pipe'):
        read(tmp_path / 'pipe')
