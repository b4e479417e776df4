"""Seconds of decoding, and of its phases, without a wait for the device in each of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """Wall-clock of one batch, and its shares of drafting and of the target's verification.

    On a GPU the shares are the device's own, from the start of the first kernel to the end of the
    last.
    """

    total: float
    draft: float
    verify: float


def device_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, read once all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PhaseClock:
    """Seconds by phase; on a GPU events mark the phases, so that the host waits for none."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, device_time(device)
        self.seconds = {"draft": 0.0, "verify": 0.0}
        self._ended: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside counts as `name`."""
        if self.device.type == "cuda":
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            yield
            ended.record()
            self._ended.append((name, started, ended))
        else:
            begun = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - begun

    def settle(self) -> None:
        """Add the phases that ended before the host waited for the device, as it just has."""
        for name, started, ended in self._ended:
            self.seconds[name] += 1e-3 * started.elapsed_time(ended)  # milliseconds
        self._ended.clear()

    def read(self) -> Seconds:
        """The seconds so far, once all work queued on the device is done."""
        total = device_time(self.device) - self.started
        self.settle()
        return Seconds(total, **self.seconds)
