"""The pretended GPU: it raises and counts where a real one would raise and wait."""

import pytest
import torch

from tests.gpu.streams import Unordered
from tests.gpu.tagged import CUDA, GpuPretence, MixedDevices


def test_host_tensors_and_device_tensors_do_not_meet():
    with GpuPretence():
        on_gpu = torch.ones(3, device="cuda")
        assert (on_gpu + 1).device == CUDA
        with pytest.raises(MixedDevices):
            on_gpu + torch.ones(3)
        with pytest.raises(MixedDevices):
            torch.ones(3).add_(on_gpu)
        assert (on_gpu * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]  # a number, on both


@pytest.mark.parametrize(
    ("num_waits", "what"),
    [
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (1, lambda x: float(x.sum())),
        (1, lambda x: bool(x.any())),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 1]),
        (1, lambda x: x[[0, 1]]),
        (1, lambda x: torch.tensor([1, 2], device=x.device)),
        (1, lambda x: torch.ones(2).to(x.device, non_blocking=True)),
        (1, lambda x: torch.zeros(3).copy_(x)),
        (1, lambda x: torch.cuda.synchronize()),
        (0, lambda x: torch.empty(2, pin_memory=True).to(x.device, non_blocking=True)),
        (0, lambda x: x[torch.arange(2, device=x.device)]),
        (0, lambda x: x.cumsum(0)[1:].add_(1)),
        (0, lambda x: x.to(torch.float64).to(x.device)),
    ],
)
def test_every_wait_of_the_host_is_counted(num_waits: int, what):
    with GpuPretence() as gpu:
        on_gpu = torch.ones(3, device="cuda")
        what(on_gpu)
        assert gpu.num_waits == num_waits


def test_the_time_of_an_event_cannot_be_read_before_the_host_has_waited_for_it():
    with GpuPretence():
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        on_gpu = torch.ones(3, device="cuda") + 1
        ended.record()
        with pytest.raises(RuntimeError, match="not ready"):
            started.elapsed_time(ended)
        on_gpu.tolist()
        assert started.elapsed_time(ended) > 0


def test_work_of_two_streams_is_in_no_order_that_no_event_gives():
    with GpuPretence() as gpu:
        own = torch.cuda.Stream()
        with torch.cuda.stream(own):
            on_gpu = torch.ones(3, device="cuda")
            on_gpu += 1  # the stream's own work is in order
        with pytest.raises(Unordered):
            on_gpu + 1
        early = torch.cuda.Event()
        early.record()
        own.wait_event(early)
        with pytest.raises(Unordered):  # the other way round
            on_gpu + 1
        torch.cuda.current_stream().wait_event(own.record_event())
        assert (on_gpu + 1).tolist() == [3.0, 3.0, 3.0]
        assert gpu.order.errors == []


@pytest.mark.parametrize(("waits", "num_errors"), [("event", 0), ("synchronize", 0), ("none", 1)])
def test_memory_is_free_for_its_stream_when_no_other_may_still_use_it(waits: str, num_errors: int):
    with GpuPretence() as gpu:
        own = torch.cuda.Stream()
        with torch.cuda.stream(own):
            on_gpu = torch.ones(3, device="cuda")
        main = torch.cuda.current_stream()
        main.wait_event(own.record_event())
        kept = on_gpu[1:]  # the same memory
        kept + 1
        used = main.record_event()
        del on_gpu
        assert gpu.order.errors == []
        if waits == "event":
            own.wait_event(used)
        elif waits == "synchronize":
            used.synchronize()
        del kept
        assert len(gpu.order.errors) == num_errors


def test_pinned_memory_is_not_changed_before_it_was_copied():
    with GpuPretence():
        pinned = torch.empty(2, pin_memory=True)
        on_gpu = pinned.zero_().to("cuda", non_blocking=True)
        with pytest.raises(Unordered):
            pinned.fill_(1)
        with pytest.raises(Unordered):
            pinned[0] = 1
        on_gpu.tolist()
        pinned.fill_(1)


def test_changes_in_place_and_gradients_are_those_of_the_host():
    weight = torch.arange(6.0).view(2, 3)
    with GpuPretence():
        on_gpu = torch.nn.Parameter(weight.to("cuda"))
        loss = (on_gpu.square() * 2).sum()
        loss.backward()
        assert on_gpu.grad.tolist() == (4 * weight).tolist()
        optimizer = torch.optim.SGD([on_gpu], lr=0.25)
        optimizer.step()
        assert on_gpu.tolist() == torch.zeros(2, 3).tolist()
