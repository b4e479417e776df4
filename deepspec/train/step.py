"""One optimizer step over the global batch, the same however ranks and micro-batches split it."""

import json
import math
import threading
from typing import NamedTuple

import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.config.draft import TrainConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import TrainBatch
from deepspec.train.batches import StepData
from deepspec.train.distributed import World
from deepspec.train.metrics import StepMetrics
from deepspec.train.optimizer import learning_rate
from deepspec.train.strategy import Strategy
from deepspec.train.throughput import Throughput


class Trainer(NamedTuple):
    """What every step works with."""

    settings: TrainConfig
    artifact: Artifact
    inputs: dict[str, str]  # manifest digests of what is trained on, by `stage/fingerprint`
    world: World
    data: StepData
    strategy: Strategy
    metrics: StepMetrics
    throughput: Throughput
    stop: threading.Event  # set when this process is to stop


class StepResult(NamedTuple):
    """What all ranks know after a step."""

    loss: float
    gradient_norm: float
    stop: bool  # some rank is to stop; all ranks know it after the same step


def train_step(trainer: Trainer, step: int) -> StepResult:
    """One optimizer step over the global batch.

    Numerators are summed over micro-batches and ranks with their gradients, and divided once by the
    denominator of the whole global batch: how the samples were split leaves no trace (algorithms:
    Loss).

    Raises:
        TrainingFailed: the loss or its gradient is not finite; no parameter has changed.
    """
    data, world, strategy = trainer.data, trainer.world, trainer.strategy
    totals = torch.zeros(3, dtype=torch.float64)  # numerator, denominator, ranks that are to stop
    num_batches = len(data.micro_batches(step))
    num_rounds = strategy.rounds(num_batches)  # before any of them: all ranks meet here
    for batch in trainer.throughput.waiting(data.batches(step)):
        totals[:2] += accumulate(trainer, batch)
    for _ in range(num_rounds - num_batches):
        strategy.backward(None)
    trainer.throughput.tokens += sum(drawn.num_tokens for drawn in data.drawn(step))
    totals[2] = trainer.stop.is_set()
    numerator, denominator, stops = world.sum(totals.to(world.device)).tolist()
    loss = numerator / denominator if denominator else 0.0
    lr = learning_rate(step, total=data.total_steps, settings=trainer.settings)
    norm = strategy.apply(lr=lr, denominator=denominator)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(trainer, step, loss, norm)
    return StepResult(loss, norm, stops > 0)


def accumulate(trainer: Trainer, batch: TrainBatch) -> torch.Tensor:
    """Add one micro-batch's gradients; returns its loss (numerator, denominator), float64 [2]."""
    output = trainer.strategy.backward(batch)
    trainer.metrics.add(output.metrics)
    pair = float(output.numerator.detach()), float(output.denominator)
    return torch.tensor(pair, dtype=torch.float64)


def _not_finite(trainer: Trainer, step: int, loss: float, norm: float) -> TrainingFailed:
    """The error, once the ids of the batch's samples are written down."""
    sample_ids = trainer.data.source.index.sample_id
    ids = [f"{int(sample_ids[drawn.number]):016x}" for drawn in trainer.data.drawn(step)]
    name = f"bad_step_{step:08d}.json"
    trainer.artifact.write(name, json.dumps(ids).encode())
    return TrainingFailed(
        f"the loss is {loss}, its gradient's norm {norm}, at step {step}; the batch's sample ids "
        f"are in {name}",
        where=trainer.artifact.url,
        fix="lower train.lr, or look at those samples; the last checkpoint is whole",
    )
