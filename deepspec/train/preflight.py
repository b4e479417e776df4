"""What is looked at before the first step: a run that cannot learn anything fails in a minute
instead of a day.
"""

from __future__ import annotations

import copy
import logging

import torch

from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.train.batches import StepData
from deepspec.train.optimizer import trainable

log = logging.getLogger(__name__)

# share of a cache's tokens outside of which its masks are wrong, not its conversations (trap B1)
SUPERVISED = (0.01, 0.99)
OVERFIT_STEPS = 8
OVERFIT_LR = 1e-3


def check_before_training(config: RunConfig, data: StepData, draft: Drafter) -> None:
    """Masks, features and gradients of the first step's first sample.

    Raises:
        TrainingFailed: with what is wrong with the cache, or with the draft.
    """
    index, numbers = data.cache.index, data.numbers
    where = data.cache.artifact.url
    share = float(index.num_supervised[numbers].sum() / index.num_tokens[numbers].sum())
    if not SUPERVISED[0] <= share <= SUPERVISED[1]:
        what = f"{share:.1%} of the training tokens are supervised, where {SUPERVISED[0]:.0%} to {SUPERVISED[1]:.0%} can be"
        raise TrainingFailed(
            what, where=where, fix=f"look at a sample: `python -m deepspec show {config.typed}`"
        )
    batch = data.load(data.drawn(0)[:1])
    _check_states(batch, config, where)
    before, after = _overfit(draft, batch)
    log.info(
        "stage=train preflight supervised_share=%.3f loss_of_one_sample=%.4f after_%d_steps=%.4f",
        share,
        before,
        OVERFIT_STEPS,
        after,
    )
    if not after < before:
        what = f"trained on one sample alone, its loss does not fall: {before:.4f}, after {OVERFIT_STEPS} steps {after:.4f}"
        fix = (
            "compare loss.* with the draft's heads; resources.checks.preflight=warn goes on anyway"
        )
        raise TrainingFailed(what, where=f"run {config.name}", fix=fix)


def _check_states(batch: TrainBatch, config: RunConfig, where: str) -> None:
    needed = {"context features": batch.context}
    if config.hidden.last_hidden != "none":
        needed["final hidden states"] = batch.last_hidden[batch.loss_mask]
    for name, states in needed.items():
        if not torch.isfinite(states).all() or not states.any():
            what = f"the {name} of the first sample are {'all zero' if torch.isfinite(states).all() else 'not finite'}"
            raise TrainingFailed(
                what,
                where=where,
                fix=f"run `python -m deepspec verify {config.typed}`, and capture again what it names",
            )


def _overfit(draft: Drafter, batch: TrainBatch) -> tuple[float, float]:
    """The loss of a copy of the draft on one batch, before and after a few steps on it alone."""
    mirror = copy.deepcopy(draft).train()
    optimizer = torch.optim.AdamW(list(trainable(mirror).values()), lr=OVERFIT_LR)
    plan = mirror.plan(batch)
    losses = []
    for _ in range(OVERFIT_STEPS + 1):
        optimizer.zero_grad(set_to_none=True)
        output = mirror.loss(batch, plan)
        output.numerator.backward()
        optimizer.step()
        losses.append(float(output.numerator.detach()))
    return losses[0], losses[-1]
