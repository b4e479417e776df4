"""Block drafters: who sees whom, where gradients go, what happens with nothing to learn from."""

import pytest
import torch
from torch import Tensor

from deepspec.config.draft import ConfidenceConfig, LossConfig
from deepspec.model.block_draft import BlockDraft
from deepspec.model.drafter import TrainBatch
from tests.model.drafts import CONFIGS, TARGETS, dspark, make_batch, make_draft, taken, total_loss

ANCHORS = torch.tensor([3, 7])


def states_of(draft: BlockDraft, batch: TrainBatch) -> Tensor:
    with torch.no_grad():
        return draft.block_states(batch.context, draft.plan_for(batch, ANCHORS))


@pytest.mark.parametrize("target", TARGETS)
def test_a_block_sees_the_context_before_its_anchor_and_nothing_else(target: str) -> None:
    """Trap D1: the anchor's own hidden state is not known when a block is drafted, nor is any
    other block.
    """
    draft, batch = make_draft(CONFIGS["dflash"], target=target), make_batch((12,))
    assert isinstance(draft, BlockDraft)
    states = states_of(draft, batch)
    for position, moved in (
        (2, [True, True]),
        (3, [False, True]),
        (6, [False, True]),
        (7, [False, False]),
        (9, [False, False]),
    ):
        context = batch.context.clone()
        context[position] += 1.0
        changed = states_of(draft, batch._replace(context=context))
        assert [not torch.equal(changed[block], states[block]) for block in (0, 1)] == moved
    for position, moved in ((3, [True, False]), (7, [False, True]), (8, [False, False])):
        input_ids = batch.input_ids.clone()
        input_ids[position] = (input_ids[position] + 1) % 50
        changed = states_of(draft, batch._replace(input_ids=input_ids))
        assert [not torch.equal(changed[block], states[block]) for block in (0, 1)] == moved


def test_slots_of_a_block_see_each_other_in_both_directions() -> None:
    draft, batch = make_draft(CONFIGS["dflash"]), make_batch((12,))
    assert isinstance(draft, BlockDraft)
    plan = draft.plan_for(batch, ANCHORS)
    x = draft._embed_blocks(plan.anchor_tokens)
    embedded: list[Tensor] = []
    draft._embed_blocks = lambda tokens: embedded.append(x.clone().requires_grad_()) or embedded[0]  # type: ignore[method-assign,func-returns-value]
    draft.block_states(batch.context, plan)[0, 0].sum().backward()
    assert embedded[0].grad is not None
    reached = embedded[0].grad.abs().sum(-1) > 0
    assert reached[0].all() and not reached[1].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_with_nothing_to_learn_from_gives_a_zero_loss_with_a_graph(name: str) -> None:
    """Trap D3: the rank with the empty batch must step along with the others, without a NaN."""
    draft, batch = make_draft(CONFIGS[name]), make_batch()
    batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
    plan = draft.plan(batch)
    output = draft.loss(batch, plan)
    assert output.numerator.item() == 0.0
    output.numerator.backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in draft.parameters()
        if parameter.requires_grad
    )
    assert set(output.numerators) == set(draft.loss_weights)
    assert len(plan.targets.in_order) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_without_candidates_changes_nothing_for_the_others(name: str) -> None:
    draft, batch = make_draft(CONFIGS[name]), make_batch((14, 9))
    mask = batch.loss_mask.clone()
    mask[14:] = False
    both = draft.loss(batch._replace(loss_mask=mask), draft.plan(batch._replace(loss_mask=mask)))
    alone = taken(batch, 0)
    torch.testing.assert_close(both.numerator, draft.loss(alone, draft.plan(alone)).numerator)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_does_not_depend_on_how_samples_are_split(name: str) -> None:
    """Traps D4 and D11: a sample packed among others is a sample alone, in loss and gradients."""
    draft, batch = make_draft(CONFIGS[name]), make_batch((14, 9, 11))
    together = draft.loss(batch, draft.plan(batch))
    wanted = torch.autograd.grad(together.numerator, draft.fc.weight)[0]
    numerator, denominator, gradient = 0.0, 0.0, torch.zeros_like(wanted)
    for sample in range(3):
        single = taken(batch, sample)
        output = draft.loss(single, draft.plan(single))
        numerator, denominator = (
            numerator + output.numerator.item(),
            denominator + output.denominator.item(),
        )
        gradient += torch.autograd.grad(output.numerator, draft.fc.weight)[0]
    assert numerator == pytest.approx(together.numerator.item(), rel=1e-5)
    assert denominator == pytest.approx(together.denominator.item(), rel=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def gradients(draft: BlockDraft, batch: TrainBatch, settings: LossConfig) -> dict[str, bool]:
    """Which parts of the draft the loss reaches."""
    draft.configure_loss(settings)
    draft.zero_grad()
    total_loss(draft, batch).backward()
    parts = {
        "backbone": "fc.",
        "w1": "markov_head.markov_w1.",
        "w2": "markov_head.markov_w2.",
        "confidence": "confidence_head.",
    }
    named = dict(draft.named_parameters())
    return {
        part: any(
            p.grad is not None and bool(p.grad.any())
            for name, p in named.items()
            if name.startswith(prefix)
        )
        for part, prefix in parts.items()
    }


def test_each_term_reaches_the_parts_it_should() -> None:
    """Trap D6: labels are constants, and the confidence loss stops at its head where configured
    so.
    """
    batch = make_batch()
    only_ce, only_tv = LossConfig(ce=1, tv=0, confidence=0), LossConfig(ce=0, tv=1, confidence=0)
    only_confidence = LossConfig(ce=0, tv=0, confidence=1)
    joined, apart = (
        make_draft(dspark()),
        make_draft(dspark(confidence=ConfidenceConfig(detach=True))),
    )
    assert isinstance(joined, BlockDraft)
    assert isinstance(apart, BlockDraft)
    everything_but = {"backbone": True, "w1": True, "w2": True, "confidence": False}
    assert gradients(joined, batch, only_ce) == everything_but
    assert gradients(joined, batch, only_tv) == everything_but
    # Its label contains the draft's logits, W2 included: detached, so W2 hears nothing of it.
    assert gradients(joined, batch, only_confidence) == {
        "backbone": True,
        "w1": True,
        "w2": False,
        "confidence": True,
    }
    assert gradients(apart, batch, only_confidence) == {
        "backbone": False,
        "w1": False,
        "w2": False,
        "confidence": True,
    }


def test_embedding_lm_head_and_the_targets_states_take_no_gradient() -> None:
    draft, batch = make_draft(), make_batch()
    last_hidden = batch.last_hidden.clone().requires_grad_()
    total_loss(draft, batch._replace(last_hidden=last_hidden)).backward()
    assert last_hidden.grad is None
    assert draft.embed_tokens.weight.grad is None
    assert draft.lm_head.weight.grad is None


@pytest.mark.parametrize("name", CONFIGS)
def test_training_in_bfloat16_autocast_stays_finite_and_close(name: str) -> None:
    draft, batch = make_draft(CONFIGS[name]), make_batch()
    exact = total_loss(draft, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = total_loss(
            draft,
            batch._replace(
                context=batch.context.bfloat16(), last_hidden=batch.last_hidden.bfloat16()
            ),
        )
    assert rounded.dtype == torch.float32
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)


def test_states_that_are_not_stored_are_left_out_of_the_acceptance_metrics() -> None:
    draft, batch = make_draft(CONFIGS["dflash"]), make_batch((14,))
    batch = batch._replace(last_hidden=torch.zeros_like(batch.last_hidden))
    assert draft.loss(batch, draft.plan(batch)).metrics["accept@0"][1].item() == 0
