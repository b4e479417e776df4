"""The processes that train together: torchrun's ranks, or this one alone."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspec.target.loading import choose_device


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

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, ASCII and all of one length, in the order of the ranks."""
        table = torch.zeros(self.size, len(text), dtype=torch.long, device=self.device)
        table[self.rank] = torch.tensor(list(text.encode()), device=self.device)
        return [bytes(row).decode() for row in self.sum(table).tolist()]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, which every parameter has."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def wait(self) -> None:
        """Return when all ranks have called this."""
        if self.size > 1:
            dist.barrier()


def join_world(device: str, *, timeout: timedelta) -> World:
    """Join the ranks that torchrun started; without torchrun, a world of one.

    Args:
        device: `resources.devices.type`; on GPUs each rank takes that of its number on the machine.
        timeout: How long a collective waits for the other ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
    return World(int(os.environ.get("RANK", "0")), size, chosen)
