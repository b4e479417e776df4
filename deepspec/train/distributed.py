"""The processes that train together: torchrun's ranks, or this one alone."""

import atexit
import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspec.target.device import choose_device

T = TypeVar("T")


class World(NamedTuple):
    """The ranks, as one of them sees them; every method is called by all of them together."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank reports, and writes what is written once."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of the ranks.

        It travels as JSON: what torch's own collectives of objects receive may run code.
        """
        text = torch.tensor(list(json.dumps(value).encode()), device=self.device)
        lengths = torch.zeros(self.size, dtype=torch.long, device=self.device)
        lengths[self.rank] = len(text)
        widest = int(self.sum(lengths).max())
        table = torch.zeros(self.size, widest, dtype=torch.long, device=self.device)
        table[self.rank, : len(text)] = text
        rows = zip(self.sum(table).tolist(), lengths.tolist(), strict=True)
        return [json.loads(bytes(row[:length])) for row, length in rows]

    def wait(self) -> None:
        """Return when all ranks have called this."""
        if self.size > 1:
            dist.barrier()


def join_world(device: str, *, dtype: str, timeout: timedelta) -> World:
    """Join the ranks that torchrun started; without torchrun, a world of one.

    Args:
        device: `resources.devices.type`; on GPUs each rank takes that of its number on the machine.
        dtype: What it computes in, `bfloat16` or `float32`.
        timeout: How long a collective waits for the other ranks.

    Raises:
        ConfigError: the device cannot be used, or the GPU of this rank is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, dtype=dtype, index=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        form_group(chosen, timeout=timeout)
    return World(int(os.environ.get("RANK", "0")), size, chosen)


def form_group(device: torch.device, **settings: Any) -> None:
    """Form the process group of ranks on such devices, unless there is one already.

    Args:
        device: On a GPU NCCL is bound to it at once, instead of guessing it in the first barrier.
        settings: Further arguments of `init_process_group`.
    """
    if not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=bound, **settings)
        atexit.register(_abandon_group)


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """A process group that is formed within the block is left at its end by all ranks together.

    A rank with an error cannot wait for the others to leave. It abandons the group when its process
    ends, once its error is reported: a lost connection is all that the others see of it. So is the
    group of a process by itself, to which DeepSpeed holds on.
    """
    was_formed = dist.is_initialized()
    yield
    if dist.is_initialized() and not was_formed and dist.get_world_size() > 1:
        dist.destroy_process_group()


def _abandon_group() -> None:
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()
