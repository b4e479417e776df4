"""What a rank trains on at a step: a pure function of (seed, step), so a run can resume anywhere on any number of ranks.

The epochs' orders, one behind the other, are one long line of samples; step s takes the next `global_batch` of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from deepspec.config import RunConfig
from deepspec.data.cache import HiddenCache
from deepspec.errors import TrainingFailed
from deepspec.model.draft import TrainBatch
from deepspec.train.world import World

T = TypeVar("T")


class Drawn(NamedTuple):
    """One sample of a step: its place in the cache, its length in tokens, and the seed of its random choices."""

    number: int
    num_tokens: int
    seed: int


class StepData:
    """Deals each step's samples to ranks and micro-batches."""

    def __init__(self, cache: HiddenCache, config: RunConfig, world: World) -> None:
        self.cache, self.settings, self.world = cache, config.train, world
        self.batch_tokens = config.resources.batch_tokens
        self.numbers = np.flatnonzero((cache.index["held_out"] == 0) & (cache.index["num_supervised"] > 1))
        if len(self.numbers) == 0:
            fix = "lower prompts.held_out, or give more prompts"
            raise TrainingFailed("the cache holds no training sample", where=cache.artifact.url, fix=fix)
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def total_steps(self) -> int:
        steps = -(-self.settings.epochs * len(self.numbers) // self.settings.global_batch)
        return min(steps, self.settings.max_steps or steps)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.settings.seed, epoch]).permutation(self.numbers)

    def drawn(self, step: int) -> list[Drawn]:
        """All samples of a step, over all ranks, shortest first."""
        samples = []
        for place in range(step * self.settings.global_batch, (step + 1) * self.settings.global_batch):
            epoch, within = divmod(place, len(self.numbers))
            number = int(self._order(epoch)[within])
            entry = self.cache.index[number]
            samples.append(Drawn(number, int(entry["num_tokens"]), sample_seed(self.settings.seed, epoch, int(entry["sample_id"]))))
        return sorted(samples, key=lambda sample: (sample.num_tokens, sample.number))

    def micro_batches(self, step: int) -> list[list[Drawn]]:
        """What this rank trains on at the step, in groups that fit `resources.batch_tokens` once padded."""
        groups: list[list[Drawn]] = []
        for sample in self.drawn(step)[self.world.rank :: self.world.size]:
            if not groups or (len(groups[-1]) + 1) * sample.num_tokens > self.batch_tokens:
                groups.append([])
            groups[-1].append(sample)
        return groups

    def load(self, group: Sequence[Drawn]) -> TrainBatch:
        """Read a micro-batch from the cache: right-padded tensors on the training device."""
        samples = [self.cache[drawn.number] for drawn in group]
        rows, length, width = len(samples), max(drawn.num_tokens for drawn in group), samples[0].context.shape[1]
        hidden = self.cache.layout.hidden_size
        input_ids = torch.zeros(rows, length, dtype=torch.long)
        loss_mask = torch.zeros(rows, length, dtype=torch.bool)
        context = torch.zeros(rows, length, width, dtype=torch.bfloat16)
        last_hidden = torch.zeros(rows, length, hidden, dtype=torch.bfloat16)
        for row, sample in enumerate(samples):
            end = len(sample.input_ids)
            input_ids[row, :end] = sample.input_ids
            loss_mask[row, :end] = sample.loss_mask.bool()
            context[row, :end] = sample.context
            last_hidden[row, :end] = sample.full_last_hidden()
        lengths = torch.tensor([drawn.num_tokens for drawn in group])
        seeds, device = tuple(drawn.seed for drawn in group), self.world.device
        return TrainBatch(input_ids.to(device), loss_mask.to(device), lengths.to(device), context.to(device), last_hidden.to(device), seeds)

    def batches(self, step: int) -> Iterator[TrainBatch]:
        """The step's micro-batches, the next one being read while the last one is trained on."""
        yield from read_ahead([lambda group=group: self.load(group) for group in self.micro_batches(step)])  # type: ignore[misc]


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """The seed (63 bits) of one sample's random choices in one epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}:{sample_id}".encode()).digest()[:8], "big") >> 1


def read_ahead(loads: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Results of the loads in order, each started while its predecessor is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        for load in loads:
            following = pool.submit(load)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
