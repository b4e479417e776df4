"""Where the hidden states that training learns from come from: what the loop needs of any source.

`HiddenCache` reads a sealed cache, `RollingStates` shards that are captured ahead of training and
deleted after it, `OnlineStates` has the target compute what comes next. A number means the same
sample in all of them.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from deepspec.artifacts.artifact import Artifact
from deepspec.cache.format import HiddenSample, Layout
from deepspec.cache.index import ExpectedIndex, Index
from deepspec.cache.sample_order import WindowedOrder


class SampleRange(NamedTuple):
    """What training will read: the order's places from `start` to `end`, so many at a step."""

    order: WindowedOrder
    start: int
    end: int
    step_samples: int


class Source:
    """The samples of a run by their number in its index."""

    artifact: Artifact
    index: Index | ExpectedIndex
    layout: Layout
    computes = False  # samples are on the device, made there on its default stream

    def __getitem__(self, number: int) -> HiddenSample:
        """One sample."""
        raise NotImplementedError

    def stream(
        self, numbers: Iterable[int], *, max_bytes: int, threads: int
    ) -> Iterator[HiddenSample]:
        """The samples in this order, `max_bytes` of them read ahead.

        A sample's tensors are valid until the next one is taken.
        """
        raise NotImplementedError

    def file(self, name: str) -> Path:
        """A local copy of one of the artifact's files that are not shards."""
        return self.artifact.store.fetch(self.artifact.path(name))

    def begin(self, samples: SampleRange) -> None:
        """Make ready for a training that takes these samples; called once, before the first
        sample is asked for.
        """

    def on_progress(self, progress: Callable[[], object]) -> None:
        """Call `progress` whenever something is made that training may be waiting for."""

    def release(self, place: int) -> None:
        """No rank will read a sample before this place of the line any more."""

    def close(self) -> None:
        """End the threads and children of the source; a thread that waits gets an error."""
