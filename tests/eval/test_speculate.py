"""Speculative decoding with scripted drafts: whatever is proposed, the answer is the target's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.config import SamplingConfig
from deepspec.eval.speculate import Decoding, speculate
from deepspec.generate import Decode, generate
from deepspec.model.draft import Proposal
from tests.test_target import PROMPTS, make_target

GREEDY = Decode(SamplingConfig(temperature=0), 12, frozenset({3}))


class Scripted:
    """Proposes the target's own continuation, wrong from position `right` of every block on."""

    block_size = 4

    def __init__(self, answers: list[list[int]], right: int) -> None:
        self.answers, self.right = answers, right
        self.done = [1] * len(answers)  # the first token came from the prompt's own pass
        self.counts: list[list[int]] = []

    def new_cache(self, rows: int, capacity: int) -> None:
        return None

    def prefill(self, cache: Any, context: Tensor, next_tokens: Tensor, counts: list[int]) -> None:
        assert context.shape[:2] == next_tokens.shape

    def propose(self, cache: Any, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None) -> Proposal:
        blocks = []
        for answer, done in zip(self.answers, self.done, strict=True):
            block = [*answer[done : done + self.block_size], *[0] * self.block_size][: self.block_size]
            blocks.append([token if index < self.right else (token + 1) % 97 for index, token in enumerate(block)])
        return Proposal(torch.tensor(blocks), None, None)

    def accept(self, cache: Any, context: Tensor, next_tokens: Tensor, counts: list[int]) -> None:
        self.counts.append(counts)
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]


@pytest.mark.parametrize("right", [0, 1, 3, 4])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch", "single"])
def test_the_tokens_are_those_of_greedy_decoding_however_good_the_draft(prompts: list[list[int]], right: int):
    target = make_target()
    plain = generate(target, prompts, GREEDY, seeds=[0] * len(prompts))
    draft = Scripted(plain, right)
    traces, seconds = speculate(target, draft, prompts, GREEDY, seeds=[0] * len(prompts))
    assert [trace.token_ids for trace in traces] == plain
    assert all(accepted >= right for trace in traces for accepted in trace.accepted[:-1])
    assert seconds.total >= seconds.draft + seconds.verify > 0


def test_a_perfect_draft_commits_a_block_and_the_bonus_each_round():
    target = make_target()
    settings = GREEDY._replace(max_new_tokens=11, stop_ids=frozenset())
    plain = generate(target, PROMPTS[:1], settings, seeds=[0])
    (trace,), _ = speculate(target, Scripted(plain, 4), PROMPTS[:1], settings, seeds=[0])
    assert trace.committed == [5, 5]
    assert trace.proposed == [4, 4]


def test_an_accepted_stop_token_ends_the_answer_without_a_bonus():
    decoding = Decoding(2, Decode(SamplingConfig(), 50, {3}))
    decoding.start([10, 20])
    counts = decoding.commit([[11, 3, 12, 13], [21, 22, 23, 24]], [4, 2], [14, 25])
    stopped, running = decoding.traces
    assert (stopped.token_ids, stopped.accepted, stopped.committed) == ([10, 11, 3], [2], [2])
    assert (running.token_ids, running.accepted, running.committed) == ([20, 21, 22, 25], [2], [3])
    assert counts == [0, 3]


def test_a_bonus_that_is_a_stop_token_is_kept_and_ends_the_answer():
    decoding = Decoding(1, Decode(SamplingConfig(), 50, {3}))
    decoding.start([10])
    assert decoding.commit([[11, 12]], [1], [3]) == [0]
    assert decoding.traces[0].token_ids == [10, 11, 3]
    assert decoding.traces[0].committed == [2]


def test_the_answer_never_exceeds_its_limit_and_finished_rows_stand_still():
    decoding = Decoding(1, Decode(SamplingConfig(), 3, {99}))
    decoding.start([1])
    assert decoding.commit([[2, 3, 4]], [3], [5]) == [0]
    assert decoding.traces[0].token_ids == [1, 2, 3]
    assert decoding.commit([[6, 7, 8]], [3], [9]) == [0]
    assert decoding.traces[0].token_ids == [1, 2, 3]
