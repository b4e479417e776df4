"""What a rank trains on at a step: a pure function of (seed, step), so a run can resume anywhere on
any number of ranks.

The epochs' orders, one behind the other, are one long line of samples; step s takes the next
`global_batch` of it. Two things run ahead of training: threads that read samples, up to a budget in
bytes, and one that makes batches of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from deepspec.cache.format import HiddenSample
from deepspec.cache.prefetch import read_ahead
from deepspec.cache.sample_order import WindowedOrder
from deepspec.cache.source import SampleRange, Source
from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import TrainBatch
from deepspec.model.execution import FILL_TOKENS
from deepspec.train.distributed import World

BATCHES_AHEAD = 2  # the one in use and the next


class Drawn(NamedTuple):
    """One sample of a step: its place in the cache, its length in tokens, and the seed of its
    random choices.
    """

    number: int
    num_tokens: int
    seed: int


class StepData:
    """Deals each step's samples to ranks and micro-batches."""

    def __init__(self, cache: Source, config: RunConfig, world: World) -> None:
        self.cache, self.settings, self.resources, self.world = (
            cache,
            config.train,
            config.resources,
            world,
        )
        index = cache.index
        self.numbers = np.flatnonzero((index.held_out == 0) & (index.num_supervised > 1))
        if len(self.numbers) == 0:
            fix = "lower prompts.held_out, or give more prompts"
            raise TrainingFailed(
                "the cache holds no training sample", where=cache.artifact.url, fix=fix
            )
        shards, settings = index.shard[self.numbers], self.settings
        self._order = WindowedOrder(
            self.numbers,
            shards,
            window_shards=settings.window_shards,
            seed=settings.seed,
            passes=settings.window_epochs,
        )
        self._ahead: Iterator[TrainBatch] = iter(())
        self._next_step: int | None = None  # the step whose batches come next out of `_ahead`

    @property
    def total_steps(self) -> int:
        steps = -(-self.settings.epochs * len(self.numbers) // self.settings.global_batch)
        return min(steps, self.settings.max_steps or steps)

    def begin(self, first: int) -> None:
        """Tell the source which samples come, from step `first` on."""
        samples = self.settings.global_batch
        self.cache.begin(
            SampleRange(self._order, first * samples, self.total_steps * samples, samples)
        )

    def finish(self) -> None:
        """Tell the source that no more samples are asked for."""
        self.cache.release(self.total_steps * self.settings.global_batch)

    def drawn(self, step: int) -> list[Drawn]:
        """All samples of a step, over all ranks, shortest first."""
        samples = []
        for place in range(
            step * self.settings.global_batch, (step + 1) * self.settings.global_batch
        ):
            epoch, number = self._order.at(place)
            seed = sample_seed(self.settings.seed, epoch, int(self.cache.index.sample_id[number]))
            samples.append(Drawn(number, int(self.cache.index.num_tokens[number]), seed))
        return sorted(samples, key=lambda sample: (sample.num_tokens, sample.number))

    def micro_batches(self, step: int) -> list[list[Drawn]]:
        """What this rank trains on at the step, packed into rows of at most
        `resources.memory.batch_tokens` (or one long sample).
        """
        groups: list[list[Drawn]] = []
        room = 0
        for sample in self.drawn(step)[self.world.rank :: self.world.size]:
            if not groups or sample.num_tokens > room:
                groups.append([])
                room = self.resources.memory.batch_tokens
            groups[-1].append(sample)
            room -= sample.num_tokens
        return groups

    def batches(self, step: int) -> Iterator[TrainBatch]:
        """The step's micro-batches; while one is trained on, the next ones are read, whatever
        step they belong to.
        """
        # What ended step - 1 was a sum over all ranks, so each of them has had all its samples.
        self.cache.release(step * self.settings.global_batch)
        if step != self._next_step:
            self._ahead = self._batches_from(step)
        yield from islice(self._ahead, len(self.micro_batches(step)))
        self._next_step = step + 1

    def _batches_from(self, first: int) -> Iterator[TrainBatch]:
        steps = range(first, self.total_steps)
        order = (
            drawn.number for step in steps for group in self.micro_batches(step) for drawn in group
        )
        max_bytes, threads = (
            self.resources.memory.prefetch_mb * 1_000_000,
            self.resources.devices.read_threads,
        )
        samples = self.cache.stream(order, max_bytes=max_bytes, threads=threads)
        jobs = (
            (1, partial(self._batch, group, samples))
            for step in steps
            for group in self.micro_batches(step)
        )
        return read_ahead(jobs, max_bytes=BATCHES_AHEAD)

    def load(self, group: Sequence[Drawn]) -> TrainBatch:
        """A micro-batch by itself."""
        return self._batch(group, (self.cache[drawn.number] for drawn in group))

    def _batch(self, group: Sequence[Drawn], samples: Iterator[HiddenSample]) -> TrainBatch:
        """The next samples packed one behind the other on the training device, to which they go
        as they are stored.
        """
        layout, device = self.cache.layout, self.world.device
        lengths = [drawn.num_tokens for drawn in group]
        total = sum(lengths)
        room = total + (-total % FILL_TOKENS if self.resources.training.compile else 0)
        input_ids = torch.zeros(room, dtype=torch.long)
        loss_mask = torch.zeros(room, dtype=torch.bool)
        context = torch.zeros(room, layout.context.width, dtype=torch.bfloat16, device=device)
        last_hidden = torch.zeros(
            room, layout.last_hidden.width, dtype=torch.bfloat16, device=device
        )
        end = 0
        for length, sample in zip(lengths, islice(samples, len(group)), strict=True):
            start, end = end, end + length
            input_ids[start:end] = sample.input_ids
            loss_mask[start:end] = sample.loss_mask.bool()
            sample.context.decode(device=device, out=context[start:end])
            sample.place_last_hidden(last_hidden[start:end])
        seeds = tuple(drawn.seed for drawn in group)
        return TrainBatch(
            input_ids.to(device),
            loss_mask.to(device),
            torch.tensor(lengths, device=device),
            context,
            last_hidden,
            seeds,
        )


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """The seed (63 bits) of one sample's random choices in one epoch."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed}:{epoch}:{sample_id}".encode()).digest()[:8], "big")
        >> 1
    )
