"""Slots chosen by numbers, which the host knows, are those that a mask chooses, to the last bit.

A mask makes the host wait for the device, which counts what is chosen. Here the losses are written
with masks.
"""

import pytest
import torch
from torch import Tensor

from deepspec.model import chunked_loss
from deepspec.model.block_draft import BlockDraft
from deepspec.model.chunked_loss import Coefficients, score
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.model.execution import Execution
from deepspec.model.loss import Slots, block_loss
from deepspec.model.targets import TargetPlaces, Targets
from tests.model.drafts import CONFIGS, make_batch, make_draft


def block_loss_by_masks(draft: BlockDraft, batch: TrainBatch) -> Tensor:
    plan = draft.plan(batch)
    counted = plan.counted
    states, markov, confidence = draft.block_states(batch.context, plan), draft.markov_head, None
    features = previous = w2 = None
    if markov is not None:
        w2, embedded = markov.markov_w2.weight, markov.markov_w1(plan.previous)
        features, previous = markov.features(states, embedded)[counted], embedded[counted]
    if draft.confidence_head is not None:
        confidence = draft.confidence_head(states[counted], previous)
    places = (plan.anchors[:, None] + torch.arange(draft.block_size))[counted]
    slots = Slots(
        states=states[counted],
        features=features,
        confidence=confidence,
        targets=Targets.gathered(batch.last_hidden, TargetPlaces.of(places)),
        labels=plan.labels[counted],
        weights=plan.weights[counted],
        numbers=counted.flatten().nonzero()[:, 0],
        shape=(len(counted), draft.block_size),
    )
    return block_loss(slots, draft.vocabulary(w2), draft.loss_weights).numerator


def eagle3_loss_by_masks(draft: Eagle3Draft, batch: TrainBatch) -> Tensor:
    plan = draft.plan(batch)
    by_step = zip(draft.step_states(batch.context, plan), plan.counted, strict=True)
    normed = torch.cat([draft.norm(states[counted]) for states, counted in by_step])
    steps, columns = plan.counted.nonzero(as_tuple=True)
    by_place = plan.weights[columns]
    factors = by_place.new_tensor([*draft.loss_weights.values()])[steps]
    places = TargetPlaces.of(plan.places[columns] + 1 + steps)
    return score(
        normed,
        None,
        draft.vocabulary(),
        Targets.gathered(batch.last_hidden, places),
        labels=None,
        coefficients=Coefficients(soft_ce=factors * by_place),
    ).total


def gradients(draft: Drafter, total: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(total, parameters))


@pytest.mark.parametrize("compile_", [False, True], ids=["as it is", "filled up"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_have_the_bits_of_those_with_masks(
    name: str, bf16: bool, compile_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", 0)  # chunks of 16 slots
    draft, batch = make_draft(CONFIGS[name]), make_batch((14, 9, 30, 5))
    if compile_:
        draft.execution = Execution(compile=True)
        plan = draft.plan(batch)
        draft.execution = Execution()
        monkeypatch.setattr(draft, "plan", lambda _: plan)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        found = draft.loss(batch, draft.plan(batch)).numerator
        if isinstance(draft, BlockDraft):
            wanted = block_loss_by_masks(draft, batch)
        else:
            assert isinstance(draft, Eagle3Draft)
            wanted = eagle3_loss_by_masks(draft, batch)
    assert torch.equal(found, wanted)
    pairs = zip(gradients(draft, found), gradients(draft, wanted), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
