"""Cells equal a slow loop over pixels, for images of any size and cells that do not divide it."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf import functional as SF
from smoot_hf.functional.removal import removal_ranks


@st.composite
def grids(draw):
    """(B, H, W), a cell that fits, and a generator."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    cell = draw(st.integers(1, min(height, width)))
    return (draw(st.integers(1, 3)), height, width), cell, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@given(grids())
def test_sums_and_their_pixels_equal_the_slow_loop(drawn):
    """Catches narrow cells that are dropped, averaged or filled up, and rows taken for columns."""
    (batch, height, width), cell, generator = drawn
    # Whole numbers: their sums are exact in any order.
    values = torch.randint(-50, 51, (batch, height, width), generator=generator).double()
    sums = SF.cell_sum(values, cell)
    assert sums.shape[1:] == SF.cell_grid((height, width), cell)
    spread = SF.spread_cells(sums, cell, (height, width))
    for image in range(batch):
        expected = reference.cell_sum(values[image].tolist(), cell)
        assert sums[image].tolist() == expected
        assert spread[image].tolist() == reference.spread_cells(expected, cell, height, width)


@given(grids(), st.booleans())
def test_a_mask_of_cells_is_exactly_k_of_them(drawn, with_nan):
    """Catches ties that do not go by the position of the cell, a NaN that is masked first, and half a cell."""
    (batch, height, width), cell, generator = drawn
    values = torch.randint(-2, 3, (batch, height, width), generator=generator).double()
    if with_nan:
        values[torch.rand(values.shape, generator=generator) < 0.1] = math.nan
    rows, columns = SF.cell_grid((height, width), cell)
    k = torch.randint(0, rows * columns + 1, (batch,), generator=generator)
    masked = SF.least_salient_mask(SF.cell_sum(values, cell), k)
    assert masked.flatten(1).sum(1).tolist() == k.tolist()
    found = SF.spread_cells(masked, cell, (height, width))
    assert found.shape == (batch, 1, height, width)
    for image in range(batch):
        expected = reference.least_salient_mask(reference.cell_sum(values[image].tolist(), cell), int(k[image]))
        assert found[image, 0].tolist() == reference.spread_cells(expected, cell, height, width)


@given(grids(), st.sampled_from(["most_salient_first", "least_salient_first"]))
def test_ranks_of_cells_equal_the_slow_loop(drawn, order):
    """Catches cells removed by their mean or their highest pixel, and pixels of a cell that go one by one."""
    (batch, height, width), cell, generator = drawn
    values = torch.randint(-2, 3, (batch, height, width), generator=generator).double()
    ranks = removal_ranks(values, order, cell)
    sign = -1 if order == "most_salient_first" else 1
    for image in range(batch):
        sums = [[sign * value for value in row] for row in reference.cell_sum(values[image].tolist(), cell)]
        turns = {place: turn for turn, place in enumerate(reference.rank_least_salient(sums))}
        expected = [[turns[row // cell, column // cell] for column in range(width)] for row in range(height)]
        assert ranks[image].tolist() == expected


def test_cells_of_one_pixel_cost_nothing():
    """Catches a copy, or a change of type, where the mask acts on pixels as it always did."""
    values = torch.rand(2, 5, 7, dtype=torch.float16)
    assert SF.cell_sum(values, 1) is values
    assert SF.spread_cells(values, 1, (5, 7)) is values


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.uint16])
def test_integers_and_booleans_are_summed_exactly(dtype):
    """Catches a sum of bytes that wraps at 256, and a type that cannot be pooled."""
    values = torch.ones(1, 20, 20).to(dtype) * (1 if dtype == torch.bool else 200)
    assert SF.cell_sum(values.to(dtype), 20).item() == 400 * (1 if dtype == torch.bool else 200)


def test_half_precision_is_summed_in_float32():
    """Catches a sum that stops growing: in bfloat16 256 + 1 is 256."""
    sums = SF.cell_sum(torch.ones(1, 32, 32, dtype=torch.bfloat16), 32)
    assert (sums.dtype, sums.item()) == (torch.float32, 1024)


def test_the_sums_of_an_image_do_not_depend_on_its_batch():
    """Catches a reduction that is rounded in another order in another batch: K would depend on the batch size."""
    values = torch.randn(33, 30, 45, generator=torch.Generator().manual_seed(0))
    whole = SF.cell_sum(values, 7)
    assert all(torch.equal(SF.cell_sum(values[row : row + 1], 7)[0], whole[row]) for row in range(33))


@pytest.mark.parametrize(
    ("cell", "message"),
    [(0, "mask_cell must be between 1 and 5, .* 5x7 pixels, got 0"), (6, "mask_cell must be between 1 and 5.* got 6"),
     (2.0, "mask_cell must be a whole number of pixels, got 2.0"), (True, "whole number of pixels, got True")],
)  # fmt: skip
def test_cells_that_do_not_fit_are_refused_by_name(cell, message):
    """Catches one cell for the whole image, which ranks nothing."""
    with pytest.raises(ValueError, match=message):
        SF.cell_grid((5, 7), cell, "mask_cell")


def test_bad_values_are_one_clear_error():
    """Catches complex values that torch fails on in words of its own, and a mask of another grid."""
    with pytest.raises(ValueError, match="complex64: take"):
        SF.cell_sum(torch.zeros(1, 4, 4, dtype=torch.complex64), 2)
    with pytest.raises(ValueError, match=r"values must have shape \(..., 2, 3\), got \(1, 1, 3, 2\)"):
        SF.spread_cells(torch.zeros(1, 1, 3, 2), 2, (4, 6))
