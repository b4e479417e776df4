"""Drafting with the cache: equal to the uncached forward pass, row by row, whatever the rows'
lengths and history.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.block_draft import BlockDraft
from deepspec.model.drafter import DraftCache, Proposal
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.model.sampling import UniformStream
from tests.model.drafts import CONFIGS, VOCAB, make_batch, make_draft

GREEDY, SAMPLED = SamplingConfig(temperature=0), SamplingConfig(temperature=1.0)
KINDS = list(product(CONFIGS, ["qwen3", "gemma4"]))


@pytest.mark.parametrize(("name", "target"), [kind for kind in KINDS if kind[0] != "eagle3"])
@torch.inference_mode()
def test_a_cached_block_is_the_block_of_training(name: str, target: str) -> None:
    """The context arrives in three parts, with a rejected proposal in between; the logits are
    those of one pass.
    """
    draft, batch = make_draft(CONFIGS[name], target=target), make_batch((12,))
    assert isinstance(draft, BlockDraft)
    tokens, context = batch.input_ids[None], batch.context[None]
    cache, anchor = draft.new_cache(1, 12), tokens[:, 9]
    for part in (context[:, :5], context[:, 5:6], torch.cat([context[:, 6:9], context[:, :2]], 1)):
        draft.propose(cache, tokens[:, cache.lengths[0]], GREEDY, None)
        draft.extend(
            cache,
            part,
            tokens[:, : part.shape[1]],
            [min(part.shape[1], 3) if cache.lengths[0] else 5],
        )
    assert cache.lengths == [9]
    proposal = draft.propose(cache, anchor, SAMPLED, UniformStream([1]).take(4))

    # the plan reads the drafted tokens as the labels
    ids = torch.cat([batch.input_ids[:9], anchor, proposal.tokens[0, :3]])
    long = batch._replace(
        input_ids=ids, loss_mask=torch.ones_like(ids, dtype=torch.bool), lengths=torch.tensor([13])
    )
    plan = draft.plan_for(long, torch.tensor([9]))
    states = draft.block_states(torch.nn.functional.pad(batch.context, (0, 0, 0, 1)), plan)
    previous, logits = None, draft.logits(states)
    if draft.markov_head is not None:
        previous = draft.markov_head.markov_w1(plan.previous)
        logits = logits + draft.markov_head.markov_w2(draft.markov_head.features(states, previous))
    torch.testing.assert_close(proposal.probs, logits.softmax(-1), rtol=1e-4, atol=1e-6)
    if draft.confidence_head is not None:
        torch.testing.assert_close(
            proposal.confidence, draft.confidence_head(states, previous).sigmoid()
        )


@pytest.mark.parametrize("target", ["qwen3", "gemma4"])
@torch.inference_mode()
def test_eagle3_drafts_what_its_training_time_test_scores(target: str) -> None:
    """The draft's own chain is the training-time test at the last verified position."""
    draft, batch = make_draft(CONFIGS["eagle3"], target=target), make_batch((12,))
    assert isinstance(draft, Eagle3Draft)
    cache, start = draft.new_cache(1, 12), 6
    tokens, context = batch.input_ids[None], batch.context[None]
    draft.extend(cache, context[:, :4], tokens[:, 1:5], [4])
    draft.propose(cache, tokens[:, 4], GREEDY, None)
    draft.extend(cache, context[:, 4:9], tokens[:, 5:10], [3])
    proposal = draft.propose(cache, tokens[:, start + 1], SAMPLED, UniformStream([1]).take(4))
    assert proposal.probs is not None

    ids = batch.input_ids.clone()
    ids[start + 2 : start + 6] = proposal.tokens[0]
    every = torch.ones_like(batch.loss_mask)
    plan = draft.plan(batch._replace(input_ids=ids, loss_mask=every))
    for step, states in enumerate(draft.step_states(batch.context, plan)):
        vocabulary_logits = draft.lm_head(draft.norm(states[start]))
        cap = draft.spec.logit_softcap
        logits = vocabulary_logits if cap is None else cap * torch.tanh(vocabulary_logits / cap)
        torch.testing.assert_close(
            proposal.probs[0, step], logits.softmax(-1), rtol=1e-4, atol=1e-6
        )


def rounds(
    draft: BlockDraft | Eagle3Draft,
    cache: DraftCache,
    counts: list[list[int]],
    inputs: list[tuple[Tensor, Tensor]],
) -> list[Proposal]:
    """Prefill and accept as told, proposing after each; row b draws from its own stream."""
    streams, proposals = UniformStream(range(len(counts[0]))), []
    for (context, tokens), accepted in zip(inputs, counts, strict=True):
        draft.extend(cache, context, tokens, accepted)
        proposals.append(
            draft.propose(cache, tokens[:, 0], SAMPLED, streams.take(draft.block_size))
        )
    return proposals


@pytest.mark.parametrize(("name", "target"), KINDS)
@torch.inference_mode()
def test_rows_of_different_lengths_draft_as_if_alone(name: str, target: str) -> None:
    draft = make_draft(CONFIGS[name], target=target)
    counts = [[7, 3, 7], [1, 4, 0], [2, 5, 1]]
    generator = torch.Generator().manual_seed(5)
    inputs = [
        (
            torch.randn(3, n, draft.spec.num_context_features, generator=generator),
            torch.randint(0, VOCAB, (3, n), generator=generator),
        )
        for n in (7, 5, 5)
    ]
    together = rounds(draft, draft.new_cache(3, 30), counts, inputs)
    for row in range(3):
        cache, stream = draft.new_cache(1, 30), UniformStream([row])
        for (context, tokens), accepted, joint in zip(inputs, counts, together, strict=True):
            draft.extend(cache, context[row : row + 1], tokens[row : row + 1], [accepted[row]])
            alone = draft.propose(
                cache, tokens[row : row + 1, 0], SAMPLED, stream.take(draft.block_size)
            )
            assert joint.probs is not None
            assert alone.probs is not None
            assert torch.equal(alone.tokens[0], joint.tokens[row])
            torch.testing.assert_close(alone.probs[0], joint.probs[row], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
@torch.inference_mode()
def test_a_row_can_be_given_to_another_prompt(name: str) -> None:
    draft, first, second = make_draft(CONFIGS[name]), make_batch((9, 9)), make_batch((6,), seed=4)
    two_rows = first.context.unflatten(0, (2, 9)), first.input_ids.unflatten(0, (2, 9))
    one_row = second.context[None], second.input_ids[None]
    cache = draft.new_cache(2, 12)
    draft.extend(cache, *two_rows, [9, 8])
    single = draft.new_cache(1, 6)
    draft.extend(single, *one_row, [6])
    cache.put([0], single)
    fresh = draft.new_cache(2, 12)
    draft.extend(fresh, *two_rows, [0, 8])
    alone = draft.new_cache(1, 12)
    draft.extend(alone, *one_row, [6])
    anchor = torch.tensor([1, 2])
    both = draft.propose(cache, anchor, SAMPLED, torch.full((2, 4), 0.5))
    wanted = draft.propose(alone, anchor[:1], SAMPLED, torch.full((1, 4), 0.5))
    other = draft.propose(fresh, anchor, SAMPLED, torch.full((2, 4), 0.5))
    assert cache.lengths == [6, 8]
    assert both.probs is not None
    torch.testing.assert_close(both.probs[0], wanted.probs[0])  # type: ignore[index]
    torch.testing.assert_close(both.probs[1], other.probs[1])  # type: ignore[index]
    cache.keep([1])
    last = draft.propose(cache, anchor[1:], SAMPLED, torch.full((1, 4), 0.5))
    assert last.probs is not None
    torch.testing.assert_close(last.probs[0], both.probs[1])
