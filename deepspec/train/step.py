"""One optimizer step over the global batch, the same however ranks and micro-batches split it."""

import json
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.artifacts.artifact import Artifact
from deepspec.config.draft import TrainConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import TrainBatch
from deepspec.train.batches import StepData
from deepspec.train.checkpoint_clock import CheckpointClock
from deepspec.train.distributed import World
from deepspec.train.strategy import Strategy, learning_rate
from deepspec.train.throughput import Throughput

ACCEPT = "accept@"  # + the position in the block, from 1: the metrics of acceptance rates


class StepMetrics:
    """Sums and counts by name since the last reading.

    They are divided once, added up over batches and ranks.
    """

    def __init__(self) -> None:
        # float64 [metrics, 2] on their device, by the names of all metrics of a micro-batch
        self.totals: dict[tuple[str, ...], Tensor] = {}
        self.num_splits = 0  # of micro-batches, over all ranks already

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a micro-batch's (sum, count) of each metric; no device is waited for."""
        if metrics:
            names = tuple(metrics)
            pairs = torch.stack([number for pair in metrics.values() for number in pair])
            added = pairs.detach().double().unflatten(0, (-1, 2))
            self.totals[names] = self.totals.get(names, 0) + added

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading, which all ranks make together.

        `acceptance_length` is the expected tokens a round at the acceptance rates found,
        `micro_batch_splits` how many micro-batches did not fit into memory.
        """
        sums: dict[str, Tensor] = {}
        own = [(names, pairs.tolist()) for names, pairs in self.totals.items()]
        # A rank that had nothing to train on has no names, and takes part all the same (trap D3).
        for names, pairs in (totals for of_rank in world.gather(own) for totals in of_rank):
            for name, pair in zip(names, pairs, strict=True):
                sums[name] = sums.get(name, 0) + torch.tensor(pair, dtype=torch.float64)
        self.totals = {}
        means = {
            name: float(total / count) if count else 0.0
            for name, (total, count) in sorted(sums.items())
        }
        accept = sorted(int(name[len(ACCEPT) :]) for name in means if name.startswith(ACCEPT))
        if accept:
            rates = torch.tensor([means[f"{ACCEPT}{position}"] for position in accept])
            means["acceptance_length"] = 1.0 + float(rates.cumprod(0).sum())
        means["micro_batch_splits"] = self.num_splits
        self.num_splits = 0
        return means


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
    clock: CheckpointClock
    stop: threading.Event  # set when this process is to stop


class StepResult(NamedTuple):
    """What a step came to, on every rank the same."""

    loss: float
    gradient_norm: float
    save: bool  # by the first rank's clock a checkpoint is due
    stop: bool  # some rank is to stop


def train_step(trainer: Trainer, step: int) -> StepResult:
    """One optimizer step over the global batch.

    Numerators are summed over micro-batches and ranks with their gradients, and divided once by the
    denominator of the whole global batch: how the samples were split leaves no trace (algorithms:
    Loss).

    Raises:
        TrainingFailed: the loss or its gradient is not finite; no parameter has changed.
    """
    data, world, strategy = trainer.data, trainer.world, trainer.strategy
    # numerator, denominator, micro-batches split; is a checkpoint due, ranks that are to stop
    totals = torch.zeros(5, dtype=torch.float64, device=world.device)
    num_splits = strategy.num_splits
    num_batches = len(data.micro_batches(step))
    num_rounds = strategy.rounds(num_batches)  # before any of them: all ranks meet here
    for planned in trainer.throughput.waiting(data.batches(step, strategy.draft.plan)):
        totals[:2] += accumulate(trainer, *planned)
        del planned  # its memory is the next one's
    for _ in range(num_rounds - num_batches):
        strategy.backward(None)
    trainer.throughput.tokens += sum(drawn.num_tokens for drawn in data.drawn(step))
    totals[2] = strategy.num_splits - num_splits
    totals[3] = world.is_first and trainer.clock.is_due()
    totals[4] = trainer.stop.is_set()
    numerator, denominator, splits, saves, stops = world.sum(totals).tolist()
    trainer.metrics.num_splits += int(splits)
    loss = numerator / denominator if denominator else 0.0
    lr = learning_rate(step, total=data.total_steps, settings=trainer.settings)
    norm = strategy.apply(lr=lr, denominator=denominator)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _not_finite(trainer, step, loss, norm)
    return StepResult(loss, norm, saves > 0, stops > 0)


def accumulate(trainer: Trainer, batch: TrainBatch, plan: Any = None) -> Tensor:
    """Add one micro-batch's gradients; returns its loss (numerator, denominator), float64 [2].

    It stays on the device, which is not waited for. Without the draft's plan one is made.
    """
    output = trainer.strategy.backward(batch, plan)
    trainer.metrics.add(output.metrics)
    return torch.stack([output.numerator.detach(), output.denominator]).double()


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
