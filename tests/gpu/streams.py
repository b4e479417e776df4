"""Streams of the pretended GPU: in which order they work, as far as they were told.

A stream counts its operations, and knows up to which one it has waited for the others. Work on
memory that another stream may not have filled yet raises; memory that is freed, and so used again,
while another stream may still work with it is an error that is kept. Streams run at once, in truth,
so that whatever nobody waits for has to be taken for late.
"""

import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Reached = dict["Stream", int]  # the last operation of each stream that is known to be done


class Unordered(RuntimeError):
    """Work that nothing makes wait for what it needs."""


class Stream:
    """A CUDA stream."""

    order: "Order"  # of the pretence that is on

    def __init__(self, *_: Any, **__: Any) -> None:
        self.reached: Reached = {self: 0}

    def wait_event(self, event: Any) -> None:
        _extend(self.reached, event.reached or {})

    def wait_stream(self, other: "Stream") -> None:
        _extend(self.reached, other.reached)

    def record_event(self) -> Any:
        event = self.order.make_event()
        event.record(self)
        return event


class Order:
    """What was done to memory, by which streams."""

    def __init__(self, make_event: Any) -> None:
        Stream.order, self.make_event = self, make_event
        self.default = Stream()
        self.done: Reached = {}  # that the host has waited for
        self.errors: list[str] = []
        self._local = threading.local()
        # by the address of the memory
        self._home: dict[int, Stream] = {}
        self._written: dict[int, tuple[Stream, int]] = {}
        self._used: defaultdict[int, Reached] = defaultdict(dict)
        self._num_tensors: Counter[int] = Counter()

    def current(self, *_: Any) -> Stream:
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def is_done(self, reached: Reached) -> bool:
        return all(self.done.get(stream, 0) >= count for stream, count in reached.items())

    def wait_for(self, reached: Reached) -> None:
        _extend(self.done, reached)

    def operate(self, name: str, tensors: Sequence[Any]) -> None:
        """The current stream works with these tensors next."""
        stream = self.current()
        stream.reached[stream] += 1
        for address in filter(None, map(_address, tensors)):  # 0 has no memory
            if address in self._written and not self._knows(stream, *self._written[address]):
                raise Unordered(f"{name}: reads what another stream may not have written yet")
            self._used[address][stream] = stream.reached[stream]

    def wrote(self, tensor: Any) -> None:
        """The operation that was begun last fills the tensor's memory."""
        stream = self.current()
        self._written[_address(tensor)] = stream, stream.reached[stream]

    def begin(self, tensor: Any) -> None:
        """Another tensor is on this memory, maybe its first."""
        address = _address(tensor)
        self._num_tensors[address] += 1
        self._home.setdefault(address, self.current())
        weakref.finalize(tensor, self._end, address)

    def _end(self, address: int) -> None:
        self._num_tensors[address] -= 1
        if self._num_tensors[address]:
            return
        home = self._home.pop(address)
        self._written.pop(address, None)
        for stream, count in self._used.pop(address, {}).items():
            if not self._knows(home, stream, count):
                self.errors.append("memory was freed while another stream may still use it")

    def _knows(self, stream: Stream, other: Stream, count: int) -> bool:
        return max(stream.reached.get(other, 0), self.done.get(other, 0)) >= count


def _address(tensor: Any) -> int:
    held: Tensor = tensor.held
    return held.untyped_storage().data_ptr()


def _extend(reached: Reached, more: Reached) -> None:
    for stream, count in more.items():
        reached[stream] = max(reached.get(stream, 0), count)
