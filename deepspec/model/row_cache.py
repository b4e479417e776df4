"""The caches of all layers of a model, with one length per row.

A step writes new positions of every row and reads what rows hold. Where its rows' lengths are known
on the host, it reads no more than the longest row. As a CUDA graph it has the same shapes and
addresses each time, so that it finds the lengths on the device, and reads one of few sizes. B rows,
n new positions.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from deepspec.errors import DeepSpecError
from deepspec.model.graphs import GraphMemory, StepGraphs
from deepspec.model.host_copy import send
from deepspec.model.kv_cache import GROWTH, SPARE, LayerCache, Places


class DeviceStep:
    """A step of a graph: nothing that the host does depends on how long rows are."""

    def __init__(self, starts: Tensor, extent: int) -> None:
        self.starts = starts  # [B, 1] long, lengths of the rows
        self.extent = extent  # positions of every row that are read
        self._places: dict[tuple[int, int], Places] = {}

    def places(self, num_new: int, slots: int) -> Places:
        """Where the next positions are written, for all layers of that many slots."""
        if (num_new, slots) not in self._places:
            self._places[num_new, slots] = Places.after(self.starts, num_new, slots)
        return self._places[num_new, slots]


class RowCache:
    """Keys and values of all layers."""

    def __init__(self, windows: Sequence[int], rows: int, capacity: int) -> None:
        """A layer for each of `windows`: the positions that it sees at a time, 0 where all."""
        self.layers = [LayerCache(rows, capacity, window) for window in windows]
        self.lengths = [0] * rows
        # of each row, how many of the tokens of the next pass are its own; None: all
        self.counts: Sequence[int] | None = None
        self.graphs: StepGraphs | None = None
        self.device_step: DeviceStep | None = None  # the one that is under way
        self._starts = torch.empty(0)

    def use_graphs(self, memory: GraphMemory) -> None:
        """Take all memory at the first write, and run steps as graphs from then on."""
        self.graphs = StepGraphs(memory)
        self._starts = torch.zeros(len(self.lengths), 1, dtype=torch.long, device=memory.device)
        for layer in self.layers:
            layer.is_fixed = True

    def run(
        self,
        name: str,
        step: Callable[..., Sequence[Tensor | None]],
        inputs: Sequence[Tensor | None],
        *,
        num_new: int,
        variant: Hashable = None,
    ) -> Sequence[Any]:
        """What `step(*inputs)` returns, which writes at most `num_new` positions of every row.

        With graphs it is recorded once for each name, variant and size, unless rows are empty, and
        its results last until the next step of that name.

        Raises:
            DeepSpecError: a window has no room for so many positions at once, or a row does not
                fit.
        """
        if self.graphs is None or min(self.lengths) == 0:  # prompts have any length
            return step(*inputs)
        extent = min(bucket(self.end(num_new)), self.layers[0].capacity)
        if self.end(num_new) > extent or (num_new > SPARE and any(x.window for x in self.layers)):
            raise DeepSpecError(
                f"{num_new} positions after {max(self.lengths)} do not fit a cache of fixed size",
                fix="set resources.devices.cuda_graphs to off",
            )
        starts = self._starts[: len(self.lengths)]
        starts.copy_(send(self.lengths, starts.device)[:, None])

        def at_starts(*inputs: Tensor | None) -> Sequence[Tensor | None]:
            self.device_step = DeviceStep(starts, extent)  # what it holds is computed in the graph
            try:
                return step(*inputs)
            finally:
                self.device_step = None

        return self.graphs.run(name, at_starts, inputs, key=(variant, len(starts), extent))

    @contextmanager
    def moved(self, by: Sequence[int], on_device: Tensor | int) -> Iterator[None]:
        """Within it rows are longer by `by` [B], which the device has as well; never below 0."""
        before = self.lengths, self.device_step
        if self.device_step is None:
            self.lengths = [max(sum(both), 0) for both in zip(self.lengths, by, strict=True)]
        else:
            starts = (self.device_step.starts + on_device).clamp(min=0)
            self.device_step = DeviceStep(starts, self.device_step.extent)
        try:
            yield
        finally:
            self.lengths, self.device_step = before

    def end(self, num_new: int) -> int:
        """Positions of each row that a step of `num_new` reads."""
        step = self.device_step
        return max(self.lengths) + num_new if step is None else step.extent

    def write(self, layer: LayerCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values [B, H, n, E] at the end of the rows of one of the layers.

        Returns:
            all keys and values that the step reads there.
        """
        step = self.device_step
        if step is None:
            return layer.write(keys, values, self.lengths, self.counts)
        layer.write_at(keys, values, step.places(keys.shape[2], layer.slots))
        return layer.read(step.extent)

    def put(self, rows: Sequence[int], fresh: Self) -> None:
        """Give these rows to other sequences, prefilled in a cache of their own."""
        for layer, of_fresh in zip(self.layers, fresh.layers, strict=True):
            layer.put(rows, self.lengths, of_fresh, fresh.lengths)
        for row, length in zip(rows, fresh.lengths, strict=True):
            self.lengths[row] = length

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def reset(self) -> None:
        """Empty all rows."""
        self.lengths = [0] * len(self.lengths)

    def restore(self) -> None:
        """Have all rows again, empty, of those of a cache with graphs that were dropped."""
        for layer in self.layers:
            layer.restore()
        self.lengths = [0] * len(self._starts)


def bucket(num_positions: int) -> int:
    """The next of few sizes: a multiple of 256, and of an eighth of the power of 2 above."""
    step = max(GROWTH, (1 << num_positions.bit_length()) // 8)
    return -(-num_positions // step) * step
