"""Eagle3 reproduces the reference implementation's numbers: states, logits, step losses, every gradient."""

from __future__ import annotations

import pytest
import torch

from tests.model.vectors import batch_of, check_gradients, read_case, read_draft


@pytest.mark.parametrize("name", ["qwen3_eagle3"])
def test_eagle3_reproduces_the_reference(name: str) -> None:
    case, tensors = read_case(name)
    draft, batch = read_draft(case["config"], case["weights"], case["state_dict"]), batch_of(tensors)
    assert {key: list(value.shape) for key, value in draft.state_dict().items()} == case["state_dict"]

    every = draft.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask)))
    for step, states in enumerate(draft.step_states(batch, every)):
        counted, at = every.counted[step], every.positions[every.counted[step]]
        rows = counted.nonzero()[:, 0]
        torch.testing.assert_close(states[counted], tensors["step_hidden"][step][rows, at], rtol=0, atol=2e-5)
        logits = draft.lm_head(draft.norm(states[counted]))
        torch.testing.assert_close(logits.logsumexp(-1), tensors["step_logsumexp"][step][rows, at], rtol=0, atol=1e-5)
        assert torch.equal(logits.argmax(-1), tensors["step_argmax"][step][rows, at].long())
        if f"step{step}_logits_row0" in tensors:
            torch.testing.assert_close(logits[rows == 0], tensors[f"step{step}_logits_row0"][at[rows == 0]], rtol=1e-5, atol=1e-5)

    # The reference divides by the padded width of its batch; here padding leaves no trace, each sample has its own length.
    plan = draft.plan(batch)
    plan = plan._replace(weights=torch.full_like(plan.weights, 1.0 / batch.input_ids.shape[1]))
    output = draft.loss(batch, plan)
    for step, wanted in enumerate(case["step_losses"]):
        assert (output.numerators[f"ce@{step}"] / output.denominator).item() == pytest.approx(wanted, rel=1e-5)
    means = {key: (total / count).item() for key, (total, count) in output.metrics.items()}
    for step in range(len(case["step_losses"])):
        assert means[f"accept@{step}"] == pytest.approx(case["metrics"][f"train/accept_rate@{step}"], rel=1e-4)
        assert means[f"accuracy@{step}"] == pytest.approx(case["metrics"][f"train/accuracy@{step}"], rel=1e-4)
    assert means["tau"] == pytest.approx(case["metrics"]["train/tau_probabilistic"], rel=1e-4)
    loss = output.numerator / output.denominator
    assert loss.item() == pytest.approx(case["scalars"]["loss"], rel=1e-5)
    loss.backward()
    check_gradients(draft, case, tensors)
