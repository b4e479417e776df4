"""How well a training is fed, and how much memory it took: what tells why it is slow."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import torch

from deepspec.model.drafter import TrainBatch


class Vitals:
    """Time spent waiting for data since the last reading, and the peak of memory since the start."""

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
