"""Steps of decoding as CUDA graphs: recorded once for their shapes, then replayed with new values.

A replay launches all kernels of a step at once; launched one by one, a small batch keeps a GPU
waiting for the host most of the time. What is recorded must neither wait for the device nor depend
on numbers that the host has.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from deepspec.model.memory import is_out_of_memory

log = logging.getLogger(__name__)

Tensors = Sequence[Tensor | None]
Step = Callable[..., Tensors]
MOST_GRAPHS = 64  # of a cache; some megabytes each, and the one that rested longest goes first


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded step, and where it finds its inputs and leaves its outputs."""

    recorded: Any  # torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class GraphMemory:
    """What all graphs on a device share: memory of their intermediate results, and the buffers by
    which values go in and come out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.works = True
        self._graphs = WeakSet[Graph]()
        self._buffers: dict[Hashable, Tensor] = {}

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        """The same stream for all, which blocks of the shared memory belong to."""
        return torch.cuda.Stream(self.device)

    def clear(self) -> None:
        """Forget the buffers; graphs that are left keep theirs."""
        self._buffers.clear()

    def buffers(self, name: str, like: Tensors) -> Tensors:
        """Tensors of the same shapes, the same ones for each call with this name."""
        found: list[Tensor | None] = []
        for place, tensor in enumerate(like):
            kind = None if tensor is None else (name, place, tensor.shape, tensor.dtype)
            if tensor is not None and kind not in self._buffers:
                self._buffers[kind] = tensor.new_empty(tensor.shape)
            found.append(self._buffers.get(kind))
        return found

    def record(self, name: str, step: Step, inputs: Tensors) -> Graph | None:
        """The step as a graph that has these inputs and has not run yet; None, and a line in the
        log, where that fails.

        The step itself runs once before, on a stream beside the others: libraries set themselves
        up then.
        """
        places = self.buffers(f"{name} in", inputs)
        _copy(inputs, places)
        recorded, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        side = self._side
        side.wait_stream(main)
        # a pool can be shared as long as one of its graphs is alive
        pool = next((graph.recorded.pool() for graph in self._graphs), None)
        how: dict[str, Any] = {"stream": side, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.stream(side):
                outputs = self.buffers(f"{name} out", step(*places))
                with torch.cuda.graph(recorded, pool, **how):
                    _copy(step(*places), outputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.works = False
            log.warning(
                "decoding cuda_graphs FALLBACK: step %s cannot be recorded, kernels are launched"
                " one by one instead, which is several times slower at small batches: %s",
                name,
                str(error).strip().partition("\n")[0],
            )
            return None
        finally:
            main.wait_stream(side)
        graph = Graph(recorded, places, outputs)
        self._graphs.add(graph)
        return graph


class StepGraphs:
    """The graphs of the steps of one cache, whose tensors they read and write."""

    def __init__(self, memory: GraphMemory) -> None:
        self.memory = memory
        self._graphs: dict[Hashable, Graph] = {}

    def run(self, name: str, step: Step, inputs: Tensors, *, key: Hashable) -> Tensors:
        """What `step(*inputs)` returns; the same graph for equal names, keys and shapes."""
        shapes = tuple(None if tensor is None else tensor.shape for tensor in inputs)
        kind = name, key, shapes
        graph = self._graphs.pop(kind, None)
        if graph is not None:
            _copy(inputs, graph.inputs)
        elif self.memory.works:
            graph = self.memory.record(name, step, inputs)
        if graph is None:
            return step(*inputs)
        self._graphs[kind] = graph  # the last one is the latest
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph.recorded.replay()
        return graph.outputs


def _copy(tensors: Tensors, places: Tensors) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        if tensor is not None and place is not None:
            place.copy_(tensor)
