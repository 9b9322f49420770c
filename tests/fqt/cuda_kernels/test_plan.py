"""Launch planning: plain numbers."""

import itertools

import pytest

from fqt.cuda_kernels import plan

A100 = plan.Device((8, 0), 108, 166_912)
RTX_4090 = plan.Device((8, 9), 128, 101_376)
H200 = plan.Device((9, 0), 132, 232_448)


@pytest.mark.parametrize(
    ("device", "rows", "columns", "expected"),
    [
        (A100, 8192, 8192, ("gemm_mma", 128, 128)),
        (A100, 8192, 64, ("gemm_mma", 64, 64)),
        (A100, 256, 256, ("gemm_mma", 64, 64)),
        (RTX_4090, 8192, 8192, ("gemm_mma", 64, 64)),
        (H200, 8192, 8192, ("gemm_wgmma", 128, 256)),
        (H200, 131_072, 128, ("gemm_wgmma", 128, 128)),
        (H200, 131_072, 64, ("gemm_mma", 64, 64)),
        (H200, 1024, 1024, ("gemm_mma", 64, 64)),
    ],
)
def test_a_tile_fits_the_device_and_leaves_none_of_it_idle(device: plan.Device, rows: int, columns: int, expected: tuple):
    tile = plan.RULES.tile(device, rows, columns)
    assert (tile.family, tile.rows, tile.columns) == expected
    assert tile.shared <= device.shared


def test_every_tile_of_a_generation_fits_its_data_centre_chip():
    for device, tiles in ((A100, plan.MMA), (H200, plan.WGMMA + plan.MMA)):
        assert all(tile.shared <= device.shared for tile in tiles)
    assert not any(tile.family == "gemm_wgmma" for tile in (plan.RULES.tile(A100, n, n) for n in (64, 1024, 16384)))


def test_architectures():
    assert [device.architecture for device in (A100, RTX_4090, H200)] == ["sm_80", "sm_89", "sm_90a"]


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "compute capability 7.5 has no 1-bit products with AND; 8.0 to 9.0 have"),
        ((10, 0), "compute capability 10.0 emulates 1-bit products, slower than 8-bit ones; 8.0 to 9.0 have them"),
        ((12, 0), "compute capability 12.0 emulates 1-bit products"),
        ((8, 0), None),
        ((8, 6), None),
        ((9, 0), None),
    ],
)
def test_capabilities(capability: tuple[int, int], reason: str | None):
    found = plan.refuses(capability)
    assert found is None if reason is None else found is not None and reason in found


def test_words_hold_the_bits_and_a_copy_ends_with_them():
    for bits in range(1, 3000):
        words = plan.words_of(bits)
        assert 32 * words >= bits and words * 4 % plan.unit_of(words) == 0
        assert words - -(-bits // 32) < 4
        assert plan.words_of(bits, whole=True) % 4 == 0 and plan.words_of(bits, whole=True) * 32 >= bits
    assert [plan.words_of(bits) for bits in (0, 1, 32, 33, 64, 65, 128, 129)] == [1, 1, 1, 2, 2, 4, 4, 8]


def test_slices_cover_the_sum_once_and_fit_the_workspace():
    for rows, columns, units in itertools.product((1, 64, 512, 2048), (70, 600, 5000), (1, 63, 64, 1000, 8192, 40_000)):
        splits = plan.RULES.splits(H200, rows, columns, units)
        length = plan.slice_units(units, splits)
        slices = -(-units // length)
        assert length % 8 == 0 and (slices - 1) * length < units <= slices * length
        assert slices <= splits and (splits == 1 or splits * rows * columns * 4 <= 256 << 20)
        assert slices == 1 or length >= 64, "a slice is too short to be worth its sums"
    assert plan.RULES.splits(H200, 64, 585, 8192) > 20, "few tiles and a long sum: the device would be idle"


def test_samples_fit_the_workspace():
    assert plan.RULES.samples_together(512, 4617) * 512 * 4617 * 4 <= 256 << 20
    assert plan.RULES.samples_together(1, 1) == 65535, "as many slices as a grid may have"
    assert plan.RULES.samples_together(1 << 20, 1 << 20) == 1
