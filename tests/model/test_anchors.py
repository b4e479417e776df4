"""Anchors and labels of blocks, by hand: two samples of 8 and 7 tokens, packed."""

import torch

from deepspec.model.anchors import (
    anchor_candidates,
    filled,
    plan_blocks,
    positions_within,
    sample_anchors,
)

#                     0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14
MASK = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
LENGTHS = torch.tensor([8, 7])
IDS = torch.arange(100, 115)


def test_an_anchor_and_the_token_after_it_belong_to_an_answer_of_one_sample() -> None:
    """Trap D11: place 7 ends a sample; that the next token is supervised too is another
    sample's affair.
    """
    assert anchor_candidates(MASK, LENGTHS).nonzero()[:, 0].tolist() == [2, 5, 6, 8, 9]


def test_fill_behind_the_last_sample_has_no_anchors() -> None:
    mask = torch.cat([MASK, torch.ones(4, dtype=torch.bool)])
    drawn = sample_anchors(mask, LENGTHS, num_anchors=10, seeds=[1, 2])
    assert drawn.tolist() == [2, 5, 6, 8, 9]


def test_anchors_are_distinct_ascending_and_the_samples_own() -> None:
    """Trap D11: `num_anchors` is for each sample, not for the packed row."""
    mask, lengths = torch.ones(68, dtype=torch.bool), torch.tensor([40, 25, 3])
    drawn = sample_anchors(mask, lengths, num_anchors=10, seeds=[5, 6, 7])
    by_sample = [
        drawn[(drawn >= start) & (drawn < end)] for start, end in ((0, 40), (40, 65), (65, 68))
    ]
    assert [len(places) for places in by_sample] == [10, 10, 2]
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert all(
        int(places[-1]) < end - 1 for places, end in zip(by_sample, (40, 65, 68), strict=True)
    )
    alone = sample_anchors(mask[40:65], lengths[1:2], num_anchors=10, seeds=[6])
    assert torch.equal(alone + 40, by_sample[1])


def test_the_seed_decides_which_anchors_are_drawn() -> None:
    """Trap D7."""
    mask, lengths = torch.ones(60, dtype=torch.bool), torch.tensor([60])
    by_seed = [sample_anchors(mask, lengths, num_anchors=8, seeds=[seed]) for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert not torch.equal(by_seed[0], by_seed[2])


def test_anchors_are_uniform_over_the_candidates() -> None:
    mask, lengths = torch.ones(9 * 2000, dtype=torch.bool), torch.full((2000,), 9)
    drawn = sample_anchors(mask, lengths, num_anchors=4, seeds=range(2000))
    counts = torch.bincount(drawn % 9, minlength=9)
    assert counts[8] == 0
    assert ((counts[:8] - 1000).abs() < 120).all()  # 5 standard deviations


def test_slots_count_up_to_the_first_that_is_not_supervised_or_not_the_samples() -> None:
    plan = plan_blocks(
        IDS, MASK, LENGTHS, anchors=torch.tensor([2, 5, 6, 9]), block_size=3, decay=4.0
    )
    assert plan.counted.long().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert plan.labels[plan.counted].tolist() == [103, 106, 107, 107, 110]
    torch.testing.assert_close(plan.weights[1], torch.tensor([1.0, 0.7788008, 0.0]))
    assert plan.previous[1].tolist() == [105, 106, 107]
    assert plan.places.tolist() == [2, 5, 6, 6, 9]
    assert plan.samples.starts.tolist() == [0, 0, 0, 8]
    assert plan.positions.tolist() == [*range(8), *range(7)]


def test_positions_start_anew_with_every_sample() -> None:
    assert positions_within(torch.tensor([3, 1, 2]), 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_blocks_that_fill_up_a_plan_count_nothing() -> None:
    plan = plan_blocks(IDS, MASK, LENGTHS, anchors=torch.tensor([2, 5, 6]), block_size=3, decay=4.0)
    longer = filled(plan, 4)
    assert len(longer.anchors) == 4
    assert torch.equal(longer.weights.sum(), plan.weights.sum())
    assert longer.places.tolist() == plan.places.tolist()
    assert filled(longer, 4) is longer
