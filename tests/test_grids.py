"""Grids of volumes: axes run RAS+, and what a voxel takes from another grid."""

import nibabel as nib
import numpy as np
import pytest
from pytest import approx
from test_volumes import linear, oriented, save

from readers.body import body, otsu
from readers.volumes.nifti import Grid, read_nifti, resample


@pytest.mark.parametrize('codes', ['RAS', 'LPS', 'PIR', 'SLA', 'ASL'])
def test_a_marked_corner_keeps_its_place_and_the_axes_run_ras(codes, tmp_path):
    values = np.zeros((4, 5, 6), np.float32)
    values[0, 4, 1] = 1
    affine = oriented(codes)
    read = read_nifti(save(tmp_path / 'a.nii.gz', values, affine))
    assert nib.aff2axcodes(read.grid.affine) == ('R', 'A', 'S')
    where = np.argwhere(read.values[0] == 1)
    assert len(where) == 1 and read.grid.shape == read.values.shape[1:]
    assert read.grid.affine @ [*where[0], 1] == approx(affine @ [0, 4, 1, 1])
    assert read.own.shape == (4, 5, 6) and read.own.affine == approx(affine)


def test_a_linear_ramp_is_exact_between_voxels_and_on_a_turned_grid():
    source = Grid((12, 14, 16), oriented('RAS', mm=(1.0, 1.0, 2.0)))
    finer = source.spaced(0.5)
    assert finer.shape == (23, 27, 61)
    np.testing.assert_allclose(resample(linear(source), source, finer), linear(finer), atol=1e-3)
    coarser = source.spaced(3.0)
    assert coarser.shape == (4, 5, 11)
    inner = (slice(1, -1),) * 3                              # the Gaussian knows nothing beyond the border
    np.testing.assert_allclose(resample(linear(source), source, coarser)[inner], linear(coarser)[inner],
                               atol=0.15)
    c, s = np.cos(0.2), np.sin(0.2)
    turned = np.array([[c, -s, 0, 15], [s, c, 0, -13], [0, 0, 1, 34], [0, 0, 0, 1]])
    turned = Grid((4, 4, 6), turned)
    np.testing.assert_allclose(resample(linear(source), source, turned), linear(turned), atol=1e-3)


def test_labels_take_the_nearest_voxel():
    source = Grid((9, 9, 9), np.eye(4))
    label = np.random.default_rng(1).integers(0, 2, source.shape).astype(np.uint8)
    assert np.array_equal(resample(label, source, source.spaced(2.0), order=0), label[::2, ::2, ::2])
    shifted = Grid((8, 9, 9), source.box((0.4, 0, 0), (8, 9, 9)).affine)
    assert np.array_equal(resample(label, source, shifted, order=0), label[:8])


def test_outside_of_a_file_is_the_filling():
    source = Grid((2, 2, 2), np.eye(4))
    wide = resample(np.full((2, 2, 2), 7, np.float32), source, source.centered((4, 4, 4)), fill=-3)
    assert (wide == 7).sum() == 8 and (wide[1:3, 1:3, 1:3] == 7).all() and (wide == -3).sum() == 56


@pytest.mark.parametrize('mm, shape', [(1.0, (176, 208, 160)), (2.0, (96, 112, 80)), (4.0, (48, 64, 48))])
def test_the_published_crop_gives_the_published_sizes(mm, shape):
    grid = Grid((182, 218, 182), np.eye(4)).box((11, 9, 0), (161, 196, 152)).spaced(mm)
    assert tuple(-(-n // 16) * 16 for n in grid.shape) == shape


def test_what_is_brighter_than_the_air():
    values = np.random.default_rng(0).uniform(0, 10, (12, 12, 12)).astype(np.float32)
    head = np.zeros(values.shape, bool)
    head[3:9, 2:10, 4:11] = True
    values[head] += 100
    values[0, 0, 0] = 100                                        # a speck apart
    values[5, 5, 6] = 0                                          # a hole
    assert np.array_equal(body(values[None, None], otsu(values), largest=True)[0], head)
