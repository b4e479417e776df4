"""What a GPU is sent beside the work in use, on a stream of its own.

Copies on the stream of the work would stand in line behind all of it. On a CPU there is neither.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Sent(NamedTuple, Generic[T]):
    """Something with tensors on the device, once `ready` is reached."""

    value: T
    ready: torch.cuda.Event | None  # None on a CPU


class CopyStream(Generic[T]):
    """Sends ahead in one thread what another takes and gives back.

    Memory that was allocated on a stream is used again on it as soon as no tensor refers to it.
    Hence what was given back is referred to until an event after its last use: unlike with
    `record_stream`, no tensor in it can be missed, and no more is sent than there is room for.
    """

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        """`shared` is for what other threads compute on the device's default stream: it stays."""
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            open_stream = torch.cuda.default_stream if shared else torch.cuda.Stream
            self._stream = open_stream(device)
        self._in_use: deque[tuple[T, torch.cuda.Event]] = deque()

    def send(self, make: Callable[[], T]) -> Sent[T]:
        """What `make` returns, its tensors sent; first, what was given back is waited for."""
        if self._stream is None:
            return Sent(make(), None)
        while self._in_use:
            self._in_use[0][1].synchronize()
            self._in_use.popleft()
        with torch.cuda.stream(self._stream):
            value = make()
        return Sent(value, self._stream.record_event())

    def take(self, sent: Sent[T]) -> T:
        """The value; work that is started from now on waits for it, and not the host."""
        if sent.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(sent.ready)
        return sent.value

    def give_back(self, sent: Sent[T]) -> None:
        """Note that all work with the value has been started."""
        if sent.ready is not None:
            used = torch.cuda.current_stream(self.device).record_event()
            self._in_use.append((sent.value, used))
