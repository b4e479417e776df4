"""Work that runs out of memory is done again in halves, with the memory of the attempt free."""

import logging
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import psutil
import pytest
import torch

from deepspec.errors import OutOfMemory
from deepspec.model import memory
from deepspec.model.memory import Pieces, free_bytes, is_out_of_memory, usable_bytes

CPU = torch.device("cpu")


def pieces(work: Callable[[Sequence[int]], list[int]]) -> Pieces[int, list[int]]:
    return Pieces(work, size=sum, too_large=lambda item: OutOfMemory(f"{item} by itself"))


class Budget:
    """Squares numbers whose sum is within a budget; notes every attempt."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.tried.append(list(items))
        if sum(items) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return [item**2 for item in items]


@pytest.mark.parametrize("limit", [3, 4, 6, 100])
def test_the_results_and_their_order_do_not_depend_on_the_pieces(limit: int) -> None:
    items = [1, 2, 1, 3, 1, 1, 2]
    found = [result for piece in pieces(Budget(limit))(items) for result in piece]
    assert found == [item**2 for item in items]


def test_a_size_that_ran_out_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    budget = Budget(4)
    work = pieces(budget)
    with caplog.at_level(logging.WARNING):
        assert list(work([1] * 8)) == [[1] * 4, [1] * 4]
    assert work.num_splits == 1
    assert "8 at a time ran out of memory, done again as 4 and 4 (1 such so far)" in caplog.text
    budget.tried.clear()
    assert [result for piece in work([1] * 8) for result in piece] == [1] * 8
    assert budget.tried == [[1] * 4, [1] * 4]


def test_one_item_that_does_not_fit_is_named() -> None:
    work = pieces(Budget(4))([1, 1, 9, 1])
    assert next(work) == [1, 1]
    with pytest.raises(OutOfMemory, match="9 by itself") as caught:
        next(work)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_any_other_error_passes() -> None:
    def broken(_: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(pieces(broken)([1, 1]))


def test_nothing_of_a_failed_attempt_is_left_when_it_is_done_again() -> None:
    """An exception that is still at hand keeps its frames, and those the tensors that did not
    fit.
    """
    kept: list[weakref.ref[torch.Tensor]] = []

    def work(items: Sequence[int]) -> list[int]:
        assert all(tensor() is None for tensor in kept)
        tensor = torch.zeros(10)
        kept.append(weakref.ref(tensor))
        if len(items) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(items)

    assert [*pieces(work)([1, 2, 3])] == [[1], [2], [3]]
    assert len(kept) == 5


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no room"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(("fraction", "free"), [(1.0, 75), (0.5, 36), (0.1, 5)])
def test_a_gpu_has_what_is_free_and_what_pytorch_holds_unused(
    fraction: float, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than the process may have: `set_per_process_memory_fraction`."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    assert (free_bytes(gpu), usable_bytes(gpu)) == (free, int(0.9 * free))


def test_a_cpu_leaves_half_of_its_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=2000, available=1000)
    )
    assert (free_bytes(CPU), usable_bytes(CPU)) == (1000, memory.CPU_SHARE * 1000)
