"""How fast a training goes, how long it will take, how much it waits for data, and its memory."""

import resource
import time
from collections.abc import Iterator
from itertools import starmap
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Moment = float | torch.cuda.Event  # seconds of the host's clock, or a GPU's own mark


class Pace(NamedTuple):
    """What a training has achieved since it began in this process."""

    tokens_per_s: float
    left_s: int  # to the last step at that speed, checkpoints included
    data_wait_share: float  # of the time since the last reading
    peak_memory_bytes: int  # of the device, or of the process on a CPU


class Throughput:
    """Counts steps, tokens and waiting since training began in this process.

    What a resumed training did before it was stopped took an unknown time and does not count.
    """

    def __init__(self, device: torch.device, *, first: int, total: int) -> None:
        self.device = device
        self.first = first
        self.total = total
        self.tokens = 0
        self._waits: list[tuple[Moment, Moment]] = []
        self._began = self._last_read = time.perf_counter()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the time that each keeps its consumer waiting is counted.

        On a GPU that is the time in which it has nothing to compute, be it that the host has no
        batch or that its copies are on their way.
        """
        while True:
            began = self._moment()
            batch = next(batches, None)
            self._waits.append((began, self._moment()))
            if batch is None:
                return
            yield batch
            del batch  # it would take memory while the next is waited for

    def _moment(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, done: int) -> Pace:
        """The pace once `done` steps are done, those before this process included."""
        now = time.perf_counter()
        seconds = max(now - self._began, 1e-9)
        left_s = (self.total - done) * seconds / max(done - self.first, 1)
        wait_share = sum(starmap(_seconds, self._waits)) / max(now - self._last_read, 1e-9)
        self._waits.clear()
        self._last_read = now
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Pace(round(self.tokens / seconds, 1), round(left_s), round(wait_share, 4), peak)


def _seconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    ended.synchronize()  # reached long ago: each step ends with a sum that the host reads
    return 1e-3 * float(began.elapsed_time(ended))
