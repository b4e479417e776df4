"""Eagle3's training-time test: which tokens and states reach which step."""

import pytest
import torch
from torch import Tensor

from deepspec.model.drafter import TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from tests.model.drafts import CONFIGS, TARGETS, make_batch, make_draft

AT = 5  # the position looked at: it reads the states up to 5 and token 6, and predicts token 7


def steps_at(draft: Eagle3Draft, batch: TrainBatch) -> list[Tensor]:
    plan = draft.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask)))
    with torch.no_grad():
        return [states[AT] for states in draft.step_states(batch.context, plan)]


def moved(draft: Eagle3Draft, batch: TrainBatch, changed: TrainBatch) -> list[bool]:
    return [
        not torch.equal(a, b)
        for a, b in zip(steps_at(draft, batch), steps_at(draft, changed), strict=True)
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_no_step_sees_a_state_that_is_not_known_when_it_drafts(target: str) -> None:
    """Trap D1: states behind the position are those of tokens not yet verified; those up to it
    reach every step.
    """
    draft, batch = make_draft(CONFIGS["eagle3"], target=target), make_batch((12,))
    assert isinstance(draft, Eagle3Draft)
    for position, expected in ((AT - 2, True), (AT, True), (AT + 1, False), (AT + 3, False)):
        context = batch.context.clone()
        context[position] += 1.0
        assert moved(draft, batch, batch._replace(context=context)) == [expected] * 3


@pytest.mark.parametrize("target", TARGETS)
def test_each_step_sees_one_token_more(target: str) -> None:
    """Step s reads token t + 1 + s, which it has drafted itself by then, and none behind it."""
    draft, batch = make_draft(CONFIGS["eagle3"], target=target), make_batch((12,))
    assert isinstance(draft, Eagle3Draft)
    for ahead, expected in (
        (1, [True] * 3),
        (2, [False, True, True]),
        (3, [False, False, True]),
        (4, [False] * 3),
    ):
        ids = batch.input_ids.clone()
        ids[AT + ahead] = (ids[AT + ahead] + 1) % 50
        assert moved(draft, batch, batch._replace(input_ids=ids)) == expected
