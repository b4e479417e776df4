"""What a rank trains on at a step: a pure function of (seed, step), whatever the number of ranks.

The epochs' orders, one after the other, are one long line of samples; step s takes the next
`global_batch` of it. Two things run ahead of training: threads that read samples, up to a budget in
bytes, and one that makes batches and their plans of them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from deepspec.cache.format import HiddenSample
from deepspec.cache.prefetch import MAX_JOBS_AHEAD, read_ahead
from deepspec.cache.sample_order import WindowedOrder
from deepspec.cache.source import SampleRange, Source
from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import TrainBatch
from deepspec.model.execution import FILL_TOKENS, compiles
from deepspec.model.memory import is_out_of_memory
from deepspec.target.conversation import stream_seed
from deepspec.train.copy_stream import CopyStream, Sent
from deepspec.train.distributed import World

BATCHES_AHEAD = 2  # the one in use and the next


class DrawnSample(NamedTuple):
    """One sample of a step."""

    number: int  # its place in the source's index
    num_tokens: int
    num_slots: int  # tokens predicted for it
    seed: int  # of its random choices


class PlannedBatch(NamedTuple):
    """A micro-batch, and the draft's plan of it."""

    batch: TrainBatch
    plan: Any


Plan = Callable[[TrainBatch], Any]


class StepData:
    """Deals each step's samples to ranks and micro-batches."""

    def __init__(self, source: Source, config: RunConfig, world: World) -> None:
        settings = config.train
        self.source = source
        self.resources = config.resources
        self.draft = config.draft
        self.world = world
        self.seed = settings.seed
        self.global_batch = settings.global_batch
        self.multiple = FILL_TOKENS if compiles(config, world.device) else 1  # tokens of a batch
        index = source.index
        self.numbers = np.flatnonzero((index.held_out == 0) & (index.num_supervised > 1))
        if len(self.numbers) == 0:
            what = "the cache holds no training sample"
            fix = "lower prompts.held_out, or give more prompts"
            raise TrainingFailed(what, where=source.artifact.url, fix=fix)
        self._order = WindowedOrder(
            self.numbers,
            index.shard[self.numbers],
            window_shards=settings.window_shards,
            seed=settings.seed,
            passes=settings.window_epochs,
        )
        steps = -(-settings.epochs * len(self.numbers) // settings.global_batch)
        self.total_steps = steps if settings.max_steps is None else min(steps, settings.max_steps)
        # Threads that read ahead, batches and training look at the same steps: as many are kept as
        # reading can be ahead, so that each sample is hashed once.
        ahead = MAX_JOBS_AHEAD * world.size // settings.global_batch
        self.drawn = lru_cache(BATCHES_AHEAD + 2 + ahead)(self._draw)
        self._stream = CopyStream[PlannedBatch](world.device, shared=source.computes)
        self._ahead: Iterator[Sent[PlannedBatch] | None] = iter(())
        self._next_step: int | None = None  # the step whose batches come next out of `_ahead`

    def begin(self, first: int) -> None:
        """Announce to the source the samples from step `first` on."""
        start, end = first * self.global_batch, self.total_steps * self.global_batch
        self.source.begin(SampleRange(self._order, start, end, self.global_batch))

    def finish(self) -> None:
        """Release all samples of the source."""
        self.source.release(self.total_steps * self.global_batch)

    def _draw(self, step: int) -> list[DrawnSample]:
        """All samples of a step, over all ranks, shortest first."""
        index, samples = self.source.index, []
        for place in range(step * self.global_batch, (step + 1) * self.global_batch):
            epoch, number = self._order.at(place)
            seed = stream_seed(self.seed, epoch, int(index.sample_id[number]))
            num_slots = self.draft.num_slots(int(index.num_supervised[number]))
            samples.append(DrawnSample(number, int(index.num_tokens[number]), num_slots, seed))
        return sorted(samples, key=lambda sample: (sample.num_tokens, sample.number))

    def micro_batches(self, step: int) -> list[list[DrawnSample]]:
        """The rank's samples of a step, packed up to `resources.memory.batch_tokens` each.

        And up to as many slots as `resources.memory.batch_slots`; a larger sample is a micro-batch
        of its own.
        """
        memory = self.resources.memory
        groups: list[list[DrawnSample]] = []
        tokens = slots = 0  # that fit into the last group
        for sample in self.drawn(step)[self.world.rank :: self.world.size]:
            if not groups or sample.num_tokens > tokens or sample.num_slots > slots:
                groups.append([])
                tokens, slots = memory.batch_tokens, memory.most_slots
            groups[-1].append(sample)
            tokens -= sample.num_tokens
            slots -= sample.num_slots
        return groups

    def batches(self, step: int, plan: Plan) -> Iterator[PlannedBatch]:
        """The step's micro-batches with their plans; meanwhile the next ones are read and planned.

        One is valid until the next is asked for. `plan` is the same at every step.
        """
        # Step - 1 ended with a sum over all ranks, so each of them has had all its samples.
        self.source.release(step * self.global_batch)
        if step != self._next_step:
            self._ahead = self._batches_from(step, plan)
        for group in self.micro_batches(step):
            sent = next(self._ahead)
            if sent is None:
                batch = self.load(group)
                yield PlannedBatch(batch, plan(batch))
                del batch
                continue
            yield self._stream.take(sent)
            self._stream.give_back(sent)
            del sent  # or it would take memory while the one after the next is made
        self._next_step = step + 1

    def _batches_from(self, first: int, plan: Plan) -> Iterator[Sent[PlannedBatch] | None]:
        steps = range(first, self.total_steps)
        # Once for the threads that read, once for the one that makes batches.
        to_read, to_batch = (
            (group for step in steps for group in self.micro_batches(step)) for _ in range(2)
        )
        samples = self.source.stream(
            (drawn.number for group in to_read for drawn in group),
            max_bytes=self.resources.memory.prefetch_mb * 1_000_000,
            threads=self.resources.devices.read_threads,
        )
        jobs = ((1, partial(self._batch_ahead, group, samples, plan)) for group in to_batch)
        return read_ahead(jobs, max_bytes=BATCHES_AHEAD)

    def _batch_ahead(
        self, group: Sequence[DrawnSample], samples: Iterator[HiddenSample], plan: Plan
    ) -> Sent[PlannedBatch] | None:
        """The next micro-batch; None where there is no room for it beside the one in use."""
        own = islice(samples, len(group))

        def planned() -> PlannedBatch:
            batch = self._batch(group, own)
            return PlannedBatch(batch, plan(batch))

        try:
            return self._stream.send(planned)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        for _ in own:  # the samples after them are the next micro-batch's
            pass
        return None

    def load(self, group: Sequence[DrawnSample]) -> TrainBatch:
        """A micro-batch by itself."""
        return self._batch(group, (self.source[drawn.number] for drawn in group))

    def _batch(self, group: Sequence[DrawnSample], samples: Iterator[HiddenSample]) -> TrainBatch:
        """The next samples, packed into one row on the training device and decoded there."""
        layout, device = self.source.layout, self.world.device
        lengths = [drawn.num_tokens for drawn in group]
        length = sum(lengths)
        length += -length % self.multiple
        input_ids = torch.zeros(length, dtype=torch.long)
        loss_mask = torch.zeros(length, dtype=torch.bool)
        context, last_hidden = (
            torch.zeros(length, width, dtype=torch.bfloat16, device=device)
            for width in (layout.context.width, layout.last_hidden.width)
        )
        end = 0
        for num_tokens, sample in zip(lengths, islice(samples, len(group)), strict=True):
            start, end = end, end + num_tokens
            input_ids[start:end] = sample.input_ids
            loss_mask[start:end] = sample.loss_mask.bool()
            sample.context.decode(device=device, out=context[start:end])
            sample.place_last_hidden(last_hidden[start:end])
        return TrainBatch(
            input_ids,
            loss_mask,
            torch.tensor(lengths),
            context,
            last_hidden,
            tuple(drawn.seed for drawn in group),
        )
