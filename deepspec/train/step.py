"""One optimizer step over the global batch, whatever the ranks and micro-batches it was split
into.
"""

from __future__ import annotations

import json
import math
import threading
from typing import NamedTuple

import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import TrainBatch
from deepspec.train.batches import StepData
from deepspec.train.distributed import World
from deepspec.train.metrics import StepMetrics
from deepspec.train.optimizer import learning_rate
from deepspec.train.strategy import Strategy
from deepspec.train.throughput import Vitals
from deepspec.train.watchdog import Watchdog


class Trainer(NamedTuple):
    """What every step works with."""

    config: RunConfig
    artifact: Artifact
    world: World
    strategy: Strategy
    stop: threading.Event  # set when this process is asked to stop
    watchdog: Watchdog
    vitals: Vitals
    inputs: dict[str, str]  # manifest digests of what is trained on


class StepResult(NamedTuple):
    loss: float
    gradient_norm: float
    stop: bool  # some rank was asked to stop; all ranks know it after the same step


def train_step(trainer: Trainer, data: StepData, step: int, metrics: StepMetrics) -> StepResult:
    """One optimizer step over the global batch.

    Numerators are summed over micro-batches and ranks with their gradients, and divided once by the
    denominator of the whole global batch: how the samples were split leaves no trace (algorithms:
    Loss).

    Raises:
        TrainingFailed: the loss or its gradient is not finite; the parameters are those of the step
            before.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    own = len(data.micro_batches(step))
    rounds = trainer.strategy.rounds(own)
    for batch in trainer.vitals.waiting(data.batches(step)):
        totals += accumulate(trainer, batch, metrics)
    for _ in range(rounds - own):
        trainer.strategy.backward(None)
    asked = torch.tensor([trainer.stop.is_set()], dtype=torch.float64)
    numerator, denominator, stops = trainer.world.sum(
        torch.cat([totals, asked]).to(trainer.world.device)
    ).tolist()
    loss = numerator / denominator if denominator else 0.0
    lr = learning_rate(step, total=data.total_steps, settings=trainer.config.train)
    norm = trainer.strategy.apply(lr=lr, denominator=denominator)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        samples = [
            f"{int(data.cache.index.sample_id[drawn.number]):016x}" for drawn in data.drawn(step)
        ]
        trainer.artifact.store.write(
            trainer.artifact.path(f"bad_step_{step:08d}.json"), json.dumps(samples).encode()
        )
        what = f"the loss is {loss}, its gradient's norm {norm}, at step {step}; the batch's sample ids are in bad_step_{step:08d}.json"
        raise TrainingFailed(
            what,
            where=trainer.artifact.url,
            fix="lower train.lr, or look at those samples; the last checkpoint is whole",
        )
    return StepResult(loss, norm, stops > 0)


def accumulate(trainer: Trainer, batch: TrainBatch, metrics: StepMetrics) -> torch.Tensor:
    """Add one micro-batch's summed gradients; returns its (loss numerator, denominator) as
    float64 [2].
    """
    output = trainer.strategy.backward(batch)
    metrics.add(output.metrics)
    return torch.tensor(
        [float(output.numerator.detach()), float(output.denominator)], dtype=torch.float64
    )
