"""Checks before the first step: a run that cannot learn anything fails in a minute, not a day."""

import copy
import logging

import torch

from deepspec.artifacts.run import Run
from deepspec.errors import OutOfMemory, TrainingFailed
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.train.batches import StepData
from deepspec.train.out_of_memory import explain_oom
from deepspec.train.strategy import adamw_kernel, loss_computed_in, trainable

log = logging.getLogger(__name__)

# Share of a cache's tokens outside of which its masks are wrong, not its conversations (trap B1).
MIN_SUPERVISED, MAX_SUPERVISED = 0.01, 0.99
OVERFIT_STEPS = 8
OVERFIT_LR = 1e-3


def check_before_training(run: Run, data: StepData, draft: Drafter) -> None:
    """Check masks, features and gradients of the first step's first sample.

    With `resources.checks.preflight: warn`, what is wrong is only logged.

    Raises:
        TrainingFailed: with what is wrong with the cache, or with the draft.
        OutOfMemory: one sample does not fit into memory.
    """
    resources = run.config.resources
    try:
        with explain_oom(run.config):
            _check(run, data, draft)
    except (TrainingFailed, OutOfMemory) as error:
        if resources.checks.preflight == "refuse":
            raise
        log.warning("stage=train preflight: %s", error.what)


def _check(run: Run, data: StepData, draft: Drafter) -> None:
    index, numbers = data.source.index, data.numbers
    where = data.source.artifact.url
    share = float(index.num_supervised[numbers].sum() / index.num_tokens[numbers].sum())
    if not MIN_SUPERVISED <= share <= MAX_SUPERVISED:
        raise TrainingFailed(
            f"{share:.1%} of the training tokens are supervised, where {MIN_SUPERVISED:.0%} to "
            f"{MAX_SUPERVISED:.0%} can be",
            where=where,
            fix=f"look at a sample: `{run.command('show')}`",
        )
    batch = data.load(data.drawn(0)[:1])
    needed = {"context features": batch.context}
    if run.config.hidden.last_hidden != "none":
        supervised = batch.loss_mask.to(batch.last_hidden.device)
        needed["final hidden states"] = batch.last_hidden[supervised]
    for name, states in needed.items():
        is_finite = bool(torch.isfinite(states).all())
        if not (is_finite and states.any()):
            what = f"the {name} of the first sample are {'all zero' if is_finite else 'not finite'}"
            fix = f"run `{run.command('verify')}`, and capture again what it names"
            raise TrainingFailed(what, where=where, fix=fix)
    before, *_, after = _overfit(draft, batch, run.config.train.compute_dtype)
    message = "stage=train preflight supervised=%.3f loss of one sample=%.4f, after %d steps=%.4f"
    log.info(message, share, before, OVERFIT_STEPS, after)
    if not after < before:
        raise TrainingFailed(
            f"trained on one sample alone, its loss does not fall: {before:.4f}, after "
            f"{OVERFIT_STEPS} steps {after:.4f}",
            where=f"run {run.config.name}",
            fix="compare loss.* with the draft's heads; resources.checks.preflight=warn goes on",
        )


def _overfit(draft: Drafter, batch: TrainBatch, compute_dtype: str) -> list[float]:
    """The losses of a copy of the draft on one batch: fresh, and after each step on it alone."""
    frozen = [parameter for parameter in draft.parameters() if not parameter.requires_grad]
    mirror = copy.deepcopy(draft, {id(parameter): parameter for parameter in frozen}).train()
    parameters = trainable(mirror).values()
    kernel = adamw_kernel(batch.context.device)
    optimizer = torch.optim.AdamW(parameters, lr=OVERFIT_LR, **kernel)
    plan = mirror.plan(batch)
    losses = []
    for _ in range(OVERFIT_STEPS + 1):
        optimizer.zero_grad(set_to_none=True)
        output = loss_computed_in(compute_dtype, mirror, batch, plan)
        output.numerator.backward()
        optimizer.step()
        losses.append(float(output.numerator.detach()))
    return losses
