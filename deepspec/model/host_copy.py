"""Small tensors on their way between the host and a device.

A copy from ordinary memory makes the host wait until the device has done all that is queued; a
round of decoding has time for two such waits at most. B rows.
"""

from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor

HOST = torch.device("cpu")

Values = TypeVar("Values")


def send(values: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """The values on the device; the host does not wait for it.

    On a GPU they go through pinned memory, which torch gives to others once the copy is done.
    """
    tensor = torch.as_tensor(values)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def send_all(values: Values, device: torch.device) -> Values:
    """A tuple with all of its tensors, and those of tuples in it, on the device, as by `send`.

    What is neither stays as it is.
    """
    if isinstance(values, Tensor):
        return cast("Values", send(values, device))
    if not isinstance(values, tuple) or device == HOST:
        return values
    make = getattr(values, "_make", tuple)
    return cast("Values", make(send_all(value, device) for value in values))


def receive(*tensors: Tensor) -> list[Any]:
    """The tensors' values as nested lists; from a GPU in one copy, so that the host waits once.

    They travel as float64, which holds float32 and integers up to 2^53.
    """
    if tensors[0].device.type != "cuda":
        return [tensor.tolist() for tensor in tensors]
    numbers = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()
    parts = zip(tensors, numbers.split([tensor.numel() for tensor in tensors]), strict=True)
    return [part.view(tensor.shape).to(tensor.dtype).tolist() for tensor, part in parts]


@lru_cache(maxsize=32)
def row_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of rows, or places in them [B] long, sent once for all layers of a round."""
    return send(numbers, device)


@lru_cache(maxsize=32)
def row_starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Lengths of rows as [B, 1] long, sent once for all layers and caches of a round.

    Rows that grow alike, as in Eagle3's slots, keep their distances and need no further copy.
    """
    least = min(lengths)
    gaps = row_numbers(tuple(length - least for length in lengths), device)
    return (gaps + least)[:, None]
