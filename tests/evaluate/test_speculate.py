"""Speculative decoding with scripted drafts: whatever is proposed, the answer is the target's
own.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.evaluate.conformance import ALGORITHMS
from deepspec.evaluate.speculate import Decoding, speculate
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Proposal
from deepspec.model.spec import DraftSpec
from deepspec.target.generate import BatchSlots, Decode, generate
from deepspec.target.model import Target
from tests.target.test_conformance import tiny_gemma4, tiny_qwen3
from tests.target.test_model import PROMPTS, make_target

GREEDY = Decode(SamplingConfig(temperature=0), 12, frozenset({3}))


class ScriptedCache:
    """Which answer each row is at, and how far; None before its prompt."""

    def __init__(self, rows: int) -> None:
        self.rows: list[tuple[int, int] | None] = [None] * rows

    def put(self, rows: list[int], fresh: "ScriptedCache") -> None:
        for row, place in zip(rows, fresh.rows, strict=True):
            self.rows[row] = place

    def keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def reset(self) -> None:
        self.rows = [None] * len(self.rows)


class Scripted:
    """Proposes the target's own continuation, wrong from position `right` of every block on."""

    block_size = 4

    def __init__(self, prompts: list[list[int]], answers: list[list[int]], right: int) -> None:
        self.prompts, self.answers, self.right = prompts, answers, right

    def new_cache(self, rows: int, capacity: int) -> ScriptedCache:
        return ScriptedCache(rows)

    def extend(
        self, cache: ScriptedCache, context: Tensor, next_tokens: Tensor, counts: list[int]
    ) -> None:
        assert context.shape[:2] == next_tokens.shape
        for row, (tokens, count) in enumerate(zip(next_tokens.tolist(), counts, strict=True)):
            if cache.rows[row] is None:
                cache.rows[row] = (self.prompt_of(tokens[:count]), 1)
            else:
                prompt, done = cache.rows[row]
                cache.rows[row] = (prompt, done + count)

    def prompt_of(self, shifted: list[int]) -> int:
        """Its number, given the prompt from its second token on and the answer's first token."""
        prompt = [prompt[1:] for prompt in self.prompts].index(shifted[:-1])
        assert shifted[-1] == self.answers[prompt][0]
        return prompt

    def propose(
        self,
        cache: ScriptedCache,
        anchor: Tensor,
        sampling: SamplingConfig,
        uniforms: Tensor | None,
    ) -> Proposal:
        blocks = []
        for prompt, done in cache.rows:
            block = [*self.answers[prompt][done : done + self.block_size], *[0] * self.block_size][
                : self.block_size
            ]
            blocks.append(
                [
                    token if index < self.right else (token + 1) % 97
                    for index, token in enumerate(block)
                ]
            )
        return Proposal(
            torch.tensor(blocks),
            None,
            torch.linspace(0.9, 0.3, self.block_size).expand(len(blocks), -1),
        )


MANY = [[5 + number, *range(20, 22 + number % 5), 40 + number] for number in range(11)]


@pytest.mark.parametrize("right", [0, 1, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
def test_the_tokens_are_those_of_greedy_decoding_however_good_the_draft_and_however_many_rows(
    batch_size: int | None, right: int
):
    """Eleven prompts on a few rows: those that finish make room for those that wait."""
    target = make_target()
    settings = GREEDY._replace(batch_size=batch_size)
    plain = generate(target, MANY, GREEDY._replace(batch_size=1), seeds=[0] * len(MANY))
    assert generate(target, MANY, settings, seeds=[0] * len(MANY)) == plain
    draft = Scripted(MANY, plain, right)
    traces, seconds = speculate(target, draft, MANY, settings, seeds=[0] * len(MANY))
    assert [trace.token_ids for trace in traces] == plain
    assert all(accepted >= right for trace in traces for accepted in trace.accepted[:-1])
    assert all(len(trace.confidence) == len(trace.proposed) for trace in traces)
    assert seconds.total >= seconds.draft + seconds.verify > 0


MODELS = {"qwen3": tiny_qwen3, "gemma4": tiny_gemma4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", MODELS)
def test_no_answer_depends_on_who_shares_its_batch(family: str, algorithm: str, temperature: float):
    """Real drafts, sliding windows included; at temperature 1 every prompt has a random stream
    of its own.
    """
    target = Target(MODELS[family](), (0, 2))
    config = target.model.config.to_dict()
    spec = DraftSpec.from_target(
        config, ALGORITHMS[algorithm], layer_ids=target.layer_ids, mask_token_id=96
    )
    draft = build_draft(
        spec, embed=target.decoder.embed_tokens.weight, lm_head=target.lm_head.weight, seed=0
    ).eval()
    settings = Decode(SamplingConfig(temperature=temperature), 20, frozenset({3, 7, 11}))
    seeds = range(len(MANY))
    alone, _ = speculate(target, draft, MANY, settings._replace(batch_size=1), seeds=seeds)
    for batch_size in (2, 4, None):
        together, _ = speculate(
            target, draft, MANY, settings._replace(batch_size=batch_size), seeds=seeds
        )
        assert [trace.token_ids for trace in together] == [trace.token_ids for trace in alone]
        assert [trace.accepted for trace in together] == [trace.accepted for trace in alone]
    if temperature == 0:
        assert [trace.token_ids for trace in alone] == generate(target, MANY, settings, seeds=seeds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_decides_how_much_is_verified_and_nothing_else(temperature: float):
    target = make_target()
    settings = Decode(SamplingConfig(temperature=temperature), 12, frozenset({3}))
    plain = generate(target, MANY, settings, seeds=range(len(MANY)))
    asked = []

    def cut(confidence: np.ndarray, running: np.ndarray) -> np.ndarray:
        asked.append(running.sum())
        return np.where(running, np.arange(len(running)) % 4, 0)

    draft = Scripted(MANY, plain, 4)
    traces, _ = speculate(
        target, draft, MANY, settings._replace(batch_size=4), seeds=range(len(MANY)), policy=cut
    )
    assert asked
    assert {length for trace in traces for length in trace.proposed} == {0, 1, 2, 3}
    assert all(
        accepted <= length
        for trace in traces
        for accepted, length in zip(trace.accepted, trace.proposed, strict=True)
    )
    if temperature == 0:
        assert [trace.token_ids for trace in traces] == plain


def test_a_perfect_draft_commits_a_block_and_the_bonus_each_round():
    target = make_target()
    settings = GREEDY._replace(max_new_tokens=11, stop_ids=frozenset())
    plain = generate(target, PROMPTS[:1], settings, seeds=[0])
    (trace,), _ = speculate(target, Scripted(PROMPTS, plain, 4), PROMPTS[:1], settings, seeds=[0])
    assert trace.committed == [5, 5]
    assert trace.proposed == [4, 4]


def started(
    tokens: list[int], max_new_tokens: int, stop_ids: set[int]
) -> tuple[Decoding, BatchSlots]:
    slots = BatchSlots(len(tokens), None)
    decoding = Decoding(slots, Decode(SamplingConfig(), max_new_tokens, stop_ids))
    decoding.start(tokens, slots.admit())
    return decoding, slots


def test_an_accepted_stop_token_ends_the_answer_without_a_bonus():
    decoding, slots = started([10, 20], 50, {3})
    counts = decoding.commit([[11, 3, 12, 13], [21, 22, 23, 24]], [4, 4], [4, 2], [14, 25])
    stopped, running = decoding.traces
    assert (stopped.token_ids, stopped.accepted, stopped.committed) == ([10, 11, 3], [2], [2])
    assert (running.token_ids, running.accepted, running.committed) == ([20, 21, 22, 25], [2], [3])
    assert counts == [0, 3]
    assert slots.running == {1: 1}


def test_a_bonus_that_is_a_stop_token_is_kept_and_ends_the_answer():
    decoding, _ = started([10], 50, {3})
    assert decoding.commit([[11, 12]], [2], [1], [3]) == [0]
    assert decoding.traces[0].token_ids == [10, 11, 3]
    assert decoding.traces[0].committed == [2]


def test_the_answer_never_exceeds_its_limit_and_finished_rows_stand_still():
    decoding, _ = started([1], 3, {99})
    assert decoding.commit([[2, 3, 4]], [3], [3], [5]) == [0]
    assert decoding.traces[0].token_ids == [1, 2, 3]
    assert decoding.commit([[6, 7, 8]], [3], [3], [9]) == [0]
    assert decoding.traces[0].token_ids == [1, 2, 3]


def test_rows_are_given_away_together_and_dropped_at_the_end():
    slots = BatchSlots(13, 8)
    assert list(slots.admit()) == list(range(8))
    del slots.running[5]
    assert slots.admit() == {}, "one of eight rows is free: the others do not wait for its prompt"
    del slots.running[2]
    assert slots.admit() == {2: 8, 5: 9}
    for row in (0, 1, 3):
        del slots.running[row]
    assert slots.admit() == {0: 10, 1: 11, 3: 12}
    assert slots.compact() == []
    for row in (0, 2, 4, 6):
        del slots.running[row]
    assert slots.compact() == [1, 3, 5, 7]
    assert slots.running == {0: 11, 1: 12, 2: 9, 3: 7}
