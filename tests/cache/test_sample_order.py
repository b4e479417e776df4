"""The order of training samples: a function of seed and epoch, shuffled in windows of shards."""

import numpy as np
import pytest

from deepspec.cache.sample_order import WindowedOrder

SHARDS = np.repeat(np.arange(10), 5)
NUMBERS = np.arange(50)


def epoch(order: WindowedOrder, number: int) -> list[int]:
    return [
        order.at(place)[1]
        for place in range(number * order.num_samples, (number + 1) * order.num_samples)
    ]


@pytest.mark.parametrize("window", [1, 3, 64])
def test_every_sample_comes_once_an_epoch(window: int):
    order = WindowedOrder(NUMBERS, SHARDS, window_shards=window, seed=1)
    assert [sorted(epoch(order, number)) for number in range(3)] == [NUMBERS.tolist()] * 3


def test_within_a_window_only_its_shards_are_read():
    seen = epoch(WindowedOrder(NUMBERS, SHARDS, window_shards=2, seed=1), 0)
    windows = [
        {SHARDS[number] for number in seen[start : start + 10]} for start in range(0, 50, 10)
    ]
    assert [len(window) for window in windows] == [2] * 5
    assert len(set.union(*windows)) == 10


def test_samples_of_a_window_are_mixed():
    seen = epoch(WindowedOrder(NUMBERS, SHARDS, window_shards=2, seed=1), 0)
    assert len({SHARDS[number] for number in seen[:4]}) == 2


def test_the_order_is_that_of_seed_and_epoch_and_of_nothing_else():
    first, again, other = (
        WindowedOrder(NUMBERS, SHARDS, window_shards=3, seed=seed) for seed in (1, 1, 2)
    )
    assert epoch(first, 1) == epoch(again, 1)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(other, 0)


def test_any_place_can_be_asked_for_first():
    straight = WindowedOrder(NUMBERS, SHARDS, window_shards=3, seed=1)
    line = [straight.at(place) for place in range(150)]
    for place in (149, 60, 3, 101):
        assert WindowedOrder(NUMBERS, SHARDS, window_shards=3, seed=1).at(place) == line[place]


def test_shards_of_unequal_size_and_shards_left_out_are_no_trouble():
    numbers, shards = np.array([1, 2, 9, 20, 21, 22]), np.array([0, 0, 3, 7, 7, 7])
    order = WindowedOrder(numbers, shards, window_shards=2, seed=0)
    assert sorted(epoch(order, 4)) == numbers.tolist()


def test_a_window_is_passed_several_times_each_in_another_order_before_the_next_one_comes():
    order = WindowedOrder(NUMBERS, SHARDS, window_shards=2, seed=1, passes=3)
    line = [order.at(place) for place in range(300)]
    for first in range(0, 300, 30):  # 2 shards of 5 samples, three times
        passes = [line[start : start + 10] for start in range(first, first + 30, 10)]
        assert len({frozenset(number for _, number in samples) for samples in passes}) == 1
        assert len({tuple(number for _, number in samples) for samples in passes}) == 3
        assert [epoch for epoch, _ in line[first : first + 30 : 10]] == [
            3 * (first // 150) + number for number in range(3)
        ]
    assert len({number for _, number in line[:150]}) == 50
    assert sorted(sample for sample in line if sample[0] == 4) == [
        (4, number) for number in range(50)
    ]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_windows_of_the_line_are_those_that_its_samples_lie_in(passes: int):
    order = WindowedOrder(NUMBERS, SHARDS, window_shards=3, seed=1, passes=passes)
    windows = order.windows(77)
    end = 77
    while end < 400:
        window = next(windows)
        assert window.start <= end < window.end
        assert {SHARDS[order.at(place)[1]] for place in range(window.start, window.end)} == set(
            window.shards
        )
        end = window.end
