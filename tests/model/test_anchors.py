"""Anchors and labels of blocks, by hand."""

from __future__ import annotations

import torch

from deepspec.model.anchors import Anchors, anchor_candidates, block_mask, plan_blocks, sample_anchors

#                      0  1  2  3  4  5  6  7
MASK = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
LENGTHS = torch.tensor([8, 7])


def test_an_anchor_and_the_token_after_it_belong_to_an_answer() -> None:
    assert [row.nonzero()[:, 0].tolist() for row in anchor_candidates(MASK, LENGTHS)] == [[2, 5, 6], [1]]


def test_anchors_are_distinct_ascending_and_the_samples_own() -> None:
    mask, lengths = torch.ones(3, 40, dtype=torch.bool), torch.tensor([40, 25, 3])
    drawn = sample_anchors(mask, lengths, num_anchors=10, seeds=[5, 6, 7])
    assert drawn.keep.sum(-1).tolist() == [10, 10, 2]
    for row, length in enumerate(lengths):
        positions = drawn.positions[row][drawn.keep[row]].tolist()
        assert positions == sorted(set(positions))
        assert positions[-1] < length - 1
    alone = sample_anchors(mask[1:2], lengths[1:2], num_anchors=10, seeds=[6])
    assert torch.equal(alone.positions[0], drawn.positions[1])


def test_the_seed_decides_which_anchors_are_drawn() -> None:
    """Trap D7."""
    mask, lengths = torch.ones(1, 60, dtype=torch.bool), torch.tensor([60])
    by_seed = [sample_anchors(mask, lengths, num_anchors=8, seeds=[seed]).positions for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert not torch.equal(by_seed[0], by_seed[2])


def test_anchors_are_uniform_over_the_candidates() -> None:
    mask, lengths = torch.ones(1, 9, dtype=torch.bool), torch.tensor([9])
    drawn = torch.cat([sample_anchors(mask, lengths, num_anchors=4, seeds=[seed]).positions for seed in range(2000)])
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert counts[8] == 0
    assert ((counts[:8] - 1000).abs() < 120).all()  # 5 standard deviations


def test_slots_count_up_to_the_first_that_is_not_supervised() -> None:
    ids = torch.arange(16).view(2, 8)
    anchors = Anchors(torch.tensor([[2, 5, 6], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool))
    plan = plan_blocks(ids, MASK, LENGTHS, anchors=anchors, block_size=3, decay=4.0)
    assert plan.counted.long().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert plan.labels[plan.counted].tolist() == [3, 6, 7, 7, 10]
    torch.testing.assert_close(plan.weights[0, 1], torch.tensor([1.0, 0.7788008, 0.0]))
    assert plan.previous[0, 1].tolist() == [5, 6, 7]
    assert plan.of_slots(ids[:, :, None])[:, 0].tolist() == [2, 5, 6, 6, 9]


def test_a_block_slot_sees_the_context_before_its_anchor_and_its_own_block() -> None:
    anchors = Anchors(torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.bool))
    seen = block_mask(anchors, num_tokens=4, block_size=2)[0, 0].long().tolist()
    first, second = [1, 0, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1]
    assert seen == [first, first, second, second]
