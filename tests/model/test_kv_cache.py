"""Caches take memory as rows grow, and what they hold is what was written last."""

import random

import pytest
import torch

from deepspec.model.host_copy import row_starts
from deepspec.model.kv_cache import LayerCache, Places, latest_positions
from deepspec.model.row_cache import RowCache

CAPACITY = 2000


def numbered(row: int, first: int, count: int) -> torch.Tensor:
    """Keys [H, n, E] that tell their row and position."""
    places = torch.arange(first, first + count, dtype=torch.float64)
    return (row * 10_000 + places)[None, :, None].expand(2, -1, 3)


def assert_held(layer: LayerCache, lengths: list[int]) -> None:
    """Each row holds what a window (none: all) sees, in the slots of the positions."""
    assert layer.pair is not None
    slots, ends = layer.slots, row_starts(tuple(lengths), torch.device("cpu"))
    for row, (length, places) in enumerate(
        zip(lengths, latest_positions(ends, slots), strict=True)
    ):
        seen = length if not layer.window else min(length, layer.window - 1)
        wanted = (places >= length - seen) & (places >= 0)
        assert wanted.sum() == seen
        for part in layer.pair:
            assert torch.equal(
                part[row, 0, wanted, 0], row * 10_000 + places[wanted].to(torch.float64)
            )


@pytest.mark.parametrize("window", [0, 40, 300])
@pytest.mark.parametrize("prompts", [[5, 9, 7], [700, 3, 320], [350, 350, 350]])
@pytest.mark.parametrize("is_fixed", [False, True])
def test_rows_hold_what_was_written_last(
    window: int, prompts: list[int], *, is_fixed: bool
) -> None:
    """While they grow, or with all memory from the first write on and lengths that the device
    alone knows.
    """
    layer, generator = LayerCache(3, CAPACITY, window), random.Random(0)
    layer.is_fixed = is_fixed
    longest = max(prompts)
    keys = torch.stack([numbered(row, 0, longest) for row in range(3)])
    layer.write(keys, keys, [0, 0, 0], prompts)
    lengths, sizes = list(prompts), {layer.slots}
    assert_held(layer, lengths)
    while max(lengths) < CAPACITY - 8:
        width = generator.choice((1, 8, 8, 8))
        keys = torch.stack([numbered(row, lengths[row], width) for row in range(3)])
        if is_fixed:
            starts = torch.tensor(lengths)[:, None]
            layer.write_at(keys, keys, Places.after(starts, width, layer.slots))
        else:
            layer.write(keys, keys, lengths)
        # some are rejected, and overwritten by the next
        lengths = [length + generator.randint(1, width) for length in lengths]
        assert_held(layer, lengths)
        sizes.add(layer.slots)
    assert max(sizes) == layer.most_slots
    assert len(sizes) == 1 if is_fixed else len(sizes) > 2 or window


def test_a_window_that_is_written_in_one_go_is_laid_out_anew() -> None:
    layer = LayerCache(2, CAPACITY, 40)
    lengths = [100, 30]
    keys = torch.stack([numbered(row, 0, 100) for row in range(2)])
    layer.write(keys, keys, [0, 0], lengths)
    for width in (1, 60, 8, 200):
        keys = torch.stack([numbered(row, lengths[row], width) for row in range(2)])
        layer.write(keys, keys, lengths)
        assert layer.slots >= 39 + width
        lengths = [lengths[0] + width, lengths[1] + 1]
        assert_held(layer, lengths)


@pytest.mark.parametrize("num_fresh", [20, 90, 600])
def test_a_row_is_given_to_another_sequence(num_fresh: int) -> None:
    cache, fresh = RowCache([0, 40], 3, CAPACITY), RowCache([0, 40], 2, num_fresh)
    for layer in cache.layers:
        keys = torch.stack([numbered(row, 0, 100) for row in range(3)])
        layer.write(keys, keys, [0, 0, 0], [100, 7, 50])
    cache.lengths = [100, 7, 50]
    for layer in fresh.layers:
        keys = torch.stack([numbered(row, 0, num_fresh) for row in (0, 2)])
        layer.write(keys, keys, [0, 0], [12, num_fresh])
    fresh.lengths = [12, num_fresh]
    cache.put([0, 2], fresh)
    assert cache.lengths == [12, 7, num_fresh]
    for layer in cache.layers:
        assert_held(layer, cache.lengths)
    cache.keep([2])
    for layer in cache.layers:
        assert layer.pair is not None
        assert layer.pair[0].shape[0] == 1


def test_memory_follows_the_rows_and_not_the_limit() -> None:
    layer, keys = LayerCache(2, 40_000), torch.ones(2, 1, 1000, 2)
    layer.write(keys, keys, [0, 0])
    assert layer.slots == 1500
    assert LayerCache(2, 40_000, 100).most_slots < 200
