"""Anchors and labels of blocks, by hand: two samples of 8 and 7 tokens, packed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.model.anchors import plan_blocks, sample_anchors
from deepspec.model.drafter import TrainBatch

#                     0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14
MASK = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
LENGTHS = torch.tensor([8, 7])
EMPTY = torch.empty(0)


def packed(mask: Tensor, lengths: Tensor, seeds: Sequence[int] = ()) -> TrainBatch:
    """Tokens 100, 101 and so on."""
    ids = torch.arange(100, 100 + len(mask))
    return TrainBatch(ids, mask, lengths, EMPTY, EMPTY, tuple(seeds))


BATCH = packed(MASK, LENGTHS, [1, 2])


def test_an_anchor_and_the_token_after_it_belong_to_an_answer_of_one_sample() -> None:
    """Trap D11: place 7 ends a sample; that the next token is supervised too is another
    sample's affair.
    """
    assert sample_anchors(BATCH, 10).tolist() == [2, 5, 6, 8, 9]


def test_fill_behind_the_last_sample_has_no_anchors() -> None:
    mask = torch.cat([MASK, torch.ones(4, dtype=torch.bool)])
    drawn = sample_anchors(packed(mask, LENGTHS, [1, 2]), 10)
    assert drawn.tolist() == [2, 5, 6, 8, 9]


def test_anchors_are_distinct_ascending_and_the_samples_own() -> None:
    """Trap D11: `num_anchors` is for each sample, not for the packed row."""
    mask, lengths = torch.ones(68, dtype=torch.bool), torch.tensor([40, 25, 3])
    drawn = sample_anchors(packed(mask, lengths, [5, 6, 7]), 10)
    by_sample = [
        drawn[(drawn >= start) & (drawn < end)] for start, end in ((0, 40), (40, 65), (65, 68))
    ]
    assert [len(places) for places in by_sample] == [10, 10, 2]
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert all(
        int(places[-1]) < end - 1 for places, end in zip(by_sample, (40, 65, 68), strict=True)
    )
    alone = sample_anchors(packed(mask[40:65], lengths[1:2], [6]), 10)
    assert torch.equal(alone + 40, by_sample[1])


def test_the_seed_decides_which_anchors_are_drawn() -> None:
    """Trap D7."""
    mask, lengths = torch.ones(60, dtype=torch.bool), torch.tensor([60])
    by_seed = [sample_anchors(packed(mask, lengths, [seed]), 8) for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert not torch.equal(by_seed[0], by_seed[2])


def test_anchors_are_uniform_over_the_candidates() -> None:
    mask, lengths = torch.ones(9 * 2000, dtype=torch.bool), torch.full((2000,), 9)
    drawn = sample_anchors(packed(mask, lengths, range(2000)), 4)
    counts = torch.bincount(drawn % 9, minlength=9)
    assert counts[8] == 0
    assert ((counts[:8] - 1000).abs() < 120).all()  # 5 standard deviations


def test_slots_count_up_to_the_first_that_is_not_supervised_or_not_the_samples() -> None:
    plan = plan_blocks(BATCH, torch.tensor([2, 5, 6, 9]), block_size=3, decay=4.0)
    assert plan.counted.long().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert plan.labels[plan.counted].tolist() == [103, 106, 107, 107, 110]
    torch.testing.assert_close(plan.weights[1], torch.tensor([1.0, 0.7788008, 0.0]))
    assert plan.previous[1].tolist() == [105, 106, 107]
    assert plan.targets.distinct[plan.targets.of_slot].tolist() == [2, 5, 6, 6, 9]
    assert plan.slots.tolist() == plan.counted.flatten().nonzero()[:, 0].tolist()
    assert plan.samples.starts.tolist() == [0, 0, 0, 8]
    assert plan.positions.tolist() == [*range(8), *range(7)]


def test_positions_start_anew_with_every_sample() -> None:
    batch = packed(torch.ones(8, dtype=torch.bool), torch.tensor([3, 1, 2]))
    plan = plan_blocks(batch, torch.tensor([0]), block_size=3, decay=None)
    assert plan.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_blocks_that_fill_up_a_plan_count_nothing() -> None:
    anchors = torch.tensor([2, 5, 6])
    plan, longer = (
        plan_blocks(BATCH, anchors, block_size=3, decay=4.0, multiple=multiple)
        for multiple in (1, 4)
    )
    assert (len(plan.anchors), len(longer.anchors)) == (3, 4)
    assert torch.equal(longer.weights.sum(), plan.weights.sum())
    assert longer.slots.tolist() == plan.slots.tolist()
    assert longer.targets.in_order.tolist() == plan.targets.in_order.tolist()
    four = torch.tensor([2, 5, 6, 9])
    assert len(plan_blocks(BATCH, four, block_size=3, decay=4.0, multiple=4).anchors) == 4
