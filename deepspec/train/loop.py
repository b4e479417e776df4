"""The train stage: a draft learns from the hidden-state cache; no rank ever loads the target."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch

from deepspec.artifact import Artifact
from deepspec.config import RunConfig
from deepspec.data.cache import HiddenCache
from deepspec.errors import TrainingFailed, TransientError
from deepspec.events import Report, silent
from deepspec.lineage import artifact_of
from deepspec.model.draft import TrainBatch
from deepspec.stages import require_sealed
from deepspec.train.acceptance import acceptance_length
from deepspec.train.data import StepData
from deepspec.train.drafts import make_draft, seal_draft
from deepspec.train.memory import knobs_named
from deepspec.train.metrics import Meter
from deepspec.train.optim import apply_step, learning_rate, make_optimizer
from deepspec.train.preflight import check_before_training
from deepspec.train.ranks import on_sigterm
from deepspec.train.state import (
    CheckpointRecord,
    append_metrics,
    best_checkpoint,
    checkpoint_records,
    put_record,
    read_metrics,
    resume,
    save_checkpoint,
    trainable,
)  # fmt: skip
from deepspec.train.vitals import Vitals
from deepspec.train.watchdog import Watchdog
from deepspec.train.world import World, join_world

log = logging.getLogger(__name__)

LOG_STEPS = 10  # optimizer steps between two lines of metrics
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class StepResult(NamedTuple):
    loss: float
    gradient_norm: float
    stop: bool  # some rank was asked to stop; all ranks know it after the same step


def run_train(config: RunConfig, report: Report = silent) -> Artifact:
    """Train from the newest checkpoint (or the start) to the last step, then write `draft/` and seal.

    Raises:
        TransientError: SIGTERM asked to stop; the step was finished and a checkpoint written.
    """
    artifact = artifact_of(config, "train")
    inputs = require_sealed(config, "train")
    resources = config.resources
    # The watchdog is to speak first: a collective that times out says less, and one that saves may be slow.
    world = join_world(resources.device, timeout=timedelta(minutes=2 * resources.stall_minutes))
    report = report if world.is_first else silent
    if world.is_first:
        artifact.create(config.model_dump(mode="json"))
    cache = HiddenCache(artifact_of(config, "hidden"), cache_gb=resources.cache_gb, check_reads=resources.check_reads)
    data = StepData(cache, config, world)
    draft = make_draft(config, cache).to(world.device)
    optimizer = make_optimizer(trainable(draft), config.train)
    first = resume(artifact, draft, optimizer)
    log.info(
        "stage=train steps=%d of %d samples=%d ranks=%d device=%s", first, data.total_steps, len(data.numbers), world.size, world.device
    )
    if first == 0:
        try:
            with knobs_named(config):
                check_before_training(config, data, draft)
        except TrainingFailed as error:
            if resources.preflight == "refuse":
                raise
            log.warning("stage=train preflight: %s", error.what)
    stop = threading.Event()
    with on_sigterm(stop.set), Watchdog(60 * resources.stall_minutes, report) as watchdog:
        train(Trainer(config, artifact, world, draft, optimizer, stop, watchdog, Vitals(world.device)), data, first, report)
    if world.is_first:
        seal_draft(artifact, draft, inputs)
    world.wait()
    return artifact


class Trainer(NamedTuple):
    """What every step works with."""

    config: RunConfig
    artifact: Artifact
    world: World
    draft: Any
    optimizer: torch.optim.Optimizer
    stop: threading.Event  # set when this process is asked to stop
    watchdog: Watchdog
    vitals: Vitals


def train(trainer: Trainer, data: StepData, first: int, report: Report) -> None:
    """Optimizer steps `first` to the last, logging and saving on the way, and before it stops because it was asked to."""
    meter, total = Meter(), data.total_steps
    history = read_metrics(trainer.artifact, first)
    started, tokens = time.monotonic(), 0
    trainer.draft.train()
    checkpoints = Checkpoints(trainer, data)
    checkpoints.resumed(first)
    for step in range(first, total):
        if checkpoints.no_better():
            break
        tokens += sum(drawn.num_tokens for drawn in data.drawn(step))
        with knobs_named(trainer.config):
            result = train_step(trainer, data, step, meter)
        done = step + 1
        if logged := done % LOG_STEPS == 0 or done == total:
            line = {
                "step": done,
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                **meter.read(trainer.world),
                **trainer.vitals.read(),
            }
            rate = tokens / (time.monotonic() - started)
            history.append({**line, "tokens_per_s": round(rate, 1)})
        if done % trainer.config.train.checkpoint_steps == 0 or done == total or result.stop:
            record = checkpoints.save(done, result)
            if record.acceptance_length is not None:
                history.append({"step": done, "held_out_acceptance_length": round(record.acceptance_length, 4)})
            if trainer.world.is_first:
                append_metrics(trainer.artifact, history)
        if logged:
            shown = {"loss": round(result.loss, 4), "acceptance_length": round(line.get("acceptance_length", 0.0), 3)}
            report({"event": "progress", "stage": "train", "done": done, "total": total, "unit": "steps", "tokens": tokens, **shown})
        if result.stop and done < total:
            trainer.world.wait()  # the first rank to end ends the others, and one of them is saving
            fix = "run it again: it goes on from there"
            raise TransientError(f"training was asked to stop, and did after step {done}", where=trainer.artifact.url, fix=fix)
        trainer.watchdog.beat()


class Checkpoints:
    """Which checkpoints there are, how far the draft was accepted at each, and whether it still gets better."""

    def __init__(self, trainer: Trainer, data: StepData) -> None:
        self.trainer, self.cache, settings = trainer, data.cache, trainer.config.train
        index = data.cache.index
        held_out = np.flatnonzero((index.held_out == 1) & (index.num_supervised > 1))
        by_id = held_out[np.argsort(index.sample_id[held_out])]  # whatever order the shards were captured in
        self.numbers: list[int] = by_id[: settings.acceptance_samples].tolist()
        self.records = checkpoint_records(trainer.artifact)
        self.total, self.every = data.total_steps, settings.checkpoint_steps

    def resumed(self, step: int) -> None:
        """Measure the checkpoint that training goes on from, if it is one of those that count and there was no time when it was saved."""
        if step % self.every == 0 and step in self.records and self.records[step].acceptance_length is None:
            self.records[step] = self._measured(self.records.pop(step))
            if self.trainer.world.is_first:
                put_record(self.trainer.artifact, self.records[step])

    def save(self, step: int, result: StepResult) -> CheckpointRecord:
        """Measure (on all ranks, unless training is to stop before its end) and save (on the first)."""
        trainer = self.trainer
        record = CheckpointRecord(step=step, loss=result.loss, since_best=self._newest().since_best)
        if step == self.total or not result.stop:
            record = self._measured(record)
        if trainer.world.is_first:
            save_checkpoint(trainer.artifact, trainer.draft, trainer.optimizer, record)
            accepted = record.acceptance_length
            log.info("stage=train step=%d loss=%.4f held_out_acceptance_length=%s checkpoint saved", step, result.loss, accepted)
        self.records[step] = record
        return record

    def no_better(self) -> bool:
        """Whether the last `train.patience` checkpoints were all worse than one before them."""
        patience = self.trainer.config.train.patience
        return patience is not None and self._newest().since_best >= patience

    def _newest(self) -> CheckpointRecord:
        return self.records[max(self.records)] if self.records else CheckpointRecord(step=0)

    def _measured(self, record: CheckpointRecord) -> CheckpointRecord:
        """The record with the acceptance of the draft as it is now."""
        if not self.numbers:
            return record
        accepted = acceptance_length(self.trainer.draft, self.cache, self.numbers, self.trainer.world)
        self._warn_if_worse(record.step, record.loss, accepted)
        best = best_checkpoint(self.records)
        better = best is None or accepted >= (best.acceptance_length or 0.0)
        return record.model_copy(update={"acceptance_length": accepted, "since_best": 0 if better else self._newest().since_best + 1})

    def _warn_if_worse(self, step: int, loss: float, accepted: float) -> None:
        best = best_checkpoint(self.records)
        if best is not None and best.acceptance_length is not None and accepted < best.acceptance_length and loss < best.loss:
            log.warning(
                "stage=train step=%d: the loss falls (%.4f to %.4f) and so does held-out acceptance (%.3f to %.3f); step %d stays the best",
                step, best.loss, loss, best.acceptance_length, accepted, best.step,
            )  # fmt: skip


def train_step(trainer: Trainer, data: StepData, step: int, meter: Meter) -> StepResult:
    """One optimizer step over the global batch.

    Numerators are summed over micro-batches and ranks with their gradients, and divided once by the denominator of the
    whole global batch: how the samples were split leaves no trace (algorithms: Loss).

    Raises:
        TrainingFailed: the loss or its gradient is not finite; the parameters are those of the step before.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in trainer.vitals.waiting(data.batches(step)):
        totals += accumulate(trainer, batch, meter)
    trainer.world.sum_gradients(list(trainable(trainer.draft).values()))
    asked = torch.tensor([trainer.stop.is_set()], dtype=torch.float64)
    numerator, denominator, stops = trainer.world.sum(torch.cat([totals, asked]).to(trainer.world.device)).tolist()
    loss = numerator / denominator if denominator else 0.0
    settings = trainer.config.train
    lr = learning_rate(step, total=data.total_steps, settings=settings)
    norm = apply_step(trainer.optimizer, lr=lr, denominator=denominator, clip=settings.clip) if denominator else 0.0
    if not (math.isfinite(loss) and math.isfinite(norm)):
        samples = [f"{int(data.cache.index.sample_id[drawn.number]):016x}" for drawn in data.drawn(step)]
        trainer.artifact.store.write(trainer.artifact.path(f"bad_step_{step:08d}.json"), json.dumps(samples).encode())
        what = f"the loss is {loss}, its gradient's norm {norm}, at step {step}; the batch's sample ids are in bad_step_{step:08d}.json"
        raise TrainingFailed(what, where=trainer.artifact.url, fix="lower train.lr, or look at those samples; the last checkpoint is whole")
    return StepResult(loss, norm, stops > 0)


def accumulate(trainer: Trainer, batch: TrainBatch, meter: Meter) -> torch.Tensor:
    """Add one micro-batch's summed gradients; returns its (loss numerator, denominator) as float64 [2]."""
    plan = trainer.draft.plan(batch)
    dtype = COMPUTE_DTYPES[trainer.config.train.compute_dtype]
    with torch.autocast(trainer.world.device.type, dtype=dtype, enabled=dtype != torch.float32):
        output = trainer.draft.loss(batch, plan)
    output.numerator.backward()
    meter.add(output.metrics)
    return torch.tensor([float(output.numerator.detach()), float(output.denominator)], dtype=torch.float64)
