"""How fast a training goes, how long it will take, how well it is fed and how much memory it
took.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import torch

from deepspec.model.drafter import TrainBatch


class Vitals:
    """Time spent waiting for data since the last reading, and the peak of memory since the
    start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waited, self._since = 0.0, time.perf_counter()

    def waiting(self, batches: Iterator[TrainBatch]) -> Iterator[TrainBatch]:
        """The batches, with the time noted that each keeps its consumer waiting."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"data_wait_share": round(share, 4), "peak_memory_bytes": peak}


class Pace:
    """Steps and tokens since training began in this process: what a resumed one did before took
    time that nobody knows.
    """

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total, self.tokens = first, total, 0
        self._began = time.monotonic()

    def add(self, num_tokens: int) -> None:
        self.tokens += num_tokens

    def read(self, done: int) -> dict[str, float]:
        """Tokens per second, and the seconds left to the last step at that speed, checkpoints
        included; `done` steps are.
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        left_s = (self.total - done) * seconds / max(done - self.first, 1)
        return {"tokens_per_s": round(self.tokens / seconds, 1), "left_s": round(left_s)}
