"""Memory that is left on a device, and work that is done again in halves where it ran out."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from deepspec.errors import OutOfMemory
from deepspec.process.host_memory import host_memory

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# in errors of CUDA and its libraries, and of PyTorch's allocator on the CPU
PHRASES = ("out of memory", "can't allocate memory", "status_alloc_failed")
# Of the free memory, what may be planned with. The rest is for activations, and for what the memory
# is split up by; on a CPU also for other processes, where asking for too much ends this one.
GPU_SHARE, CPU_SHARE = 0.9, 0.5


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in PHRASES)


@contextlib.contextmanager
def naming_oom(named: OutOfMemory) -> Iterator[None]:
    """Turn an allocation that failed within the block into an error that names what did not fit.

    Raises:
        OutOfMemory: the one given, with what the allocator reported.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reported = str(error).partition("\n")[0]
        what = f"{named.what}: {reported}"
        raise OutOfMemory(what, where=named.where, fix=named.fix) from error


def free_bytes(device: torch.device) -> int:
    """Memory of the device that this process can still take."""
    if device.type != "cuda":
        return host_memory().available
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)


def usable_bytes(device: torch.device) -> int:
    """The share of `free_bytes` that work may be planned with."""
    share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
    return int(share * free_bytes(device))


class Pieces(Generic[Item, Result]):
    """Does work on several items at once, in halves where that runs out of memory.

    A size that ran out is not tried again: later pieces begin at the size of its halves.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Result],
        *,
        size: Callable[[Sequence[Item]], int],
        too_large: Callable[[Item], OutOfMemory],
    ) -> None:
        """`size` is what a piece's memory grows with; `too_large` names an item that does not fit
        by itself.
        """
        self.work, self.size, self.too_large = work, size, too_large
        self.limit: int | None = None  # the largest size that is tried
        self.num_splits = 0

    def __call__(self, items: Sequence[Item]) -> Iterator[Result]:
        """The results of consecutive pieces that together are `items`, mostly of all at once.

        Raises:
            OutOfMemory: one item by itself does not fit.
        """
        waiting = [items]
        while waiting:
            piece = waiting.pop()
            half = len(piece) // 2
            if half and self.limit is not None and self.size(piece) > self.limit:
                waiting += [piece[half:], piece[:half]]
                continue
            try:
                yield self.work(piece)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not half:
                    raise self.too_large(piece[0]) from error
                why = str(error).splitlines()[0]
            # Out of reach of the error, whose frames hold the tensors of the attempt.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            halves = piece[:half], piece[half:]
            self.num_splits += 1
            self.limit = max(map(self.size, halves))
            log.warning(
                "%d at a time ran out of memory, done again as %d and %d (%d such so far): %s",
                len(piece),
                *map(len, halves),
                self.num_splits,
                why,
            )
            waiting += reversed(halves)
