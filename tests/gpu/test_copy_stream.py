"""Batches that are sent ahead to a GPU, as far as it can be seen without one: on a stream of their
own, complete before they are worked with, and in memory that is not used again before that ends.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.artifacts.run import Run
from deepspec.cache import prefetch
from deepspec.cache.codec_base import Codec
from deepspec.cache.codecs import CODECS, channel_scale, make_codec
from deepspec.cache.format import EncodedTensor
from deepspec.cache.reader import HiddenCache
from deepspec.config.run import RunConfig
from deepspec.hidden.online import OnlineStates
from deepspec.train.batches import StepData
from deepspec.train.copy_stream import CopyStream, Sent
from deepspec.train.distributed import World
from deepspec.train.draft_artifact import make_draft
from deepspec.train.step import StepMetrics, accumulate
from deepspec.train.strategy import Replicated
from deepspec.train.throughput import Throughput
from tests.conftest import tiny_run
from tests.gpu.streams import Unordered
from tests.gpu.tagged import CUDA, GpuPretence
from tests.gpu.test_train_step import take_path

HOST = torch.device("cpu")
NUM_STEPS = 3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pretence, in threads that read ahead as well."""
    take_path(monkeypatch, "flex")
    pretence = GpuPretence()

    class Pretending(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                with pretence.in_thread():
                    return function(*args, **kwargs)

            return super().submit(run)

    with pretence:
        monkeypatch.setattr(prefetch, "ThreadPoolExecutor", Pretending)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
        yield pretence


def trained(
    cache: HiddenCache, config: RunConfig, device: torch.device
) -> tuple[Tensor, list[Tensor], Throughput]:
    """Loss and gradients of a few steps' micro-batches, and how long they were waited for."""
    world = World(0, 1, device)
    draft = make_draft(config, cache, HOST).to(device)
    trainer: Any = SimpleNamespace(
        strategy=Replicated(draft, config.train, world), metrics=StepMetrics()
    )
    data = StepData(cache, config, world)
    data.begin(0)
    throughput = Throughput(device, first=0, total=NUM_STEPS)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for step in range(NUM_STEPS):
        for planned in throughput.waiting(data.batches(step, draft.plan)):
            totals += accumulate(trainer, *planned)
            del planned
    sums = torch.tensor(totals.tolist())
    gradients = [
        torch.tensor(parameter.grad.tolist()) for parameter in trainer.strategy.parameters.values()
    ]
    return sums, gradients, throughput


def config_of(store: Path, recipe: str) -> RunConfig:
    sets = ["train.compute_dtype=float32", "resources.memory.batch_tokens=150"]
    sets.append("resources.training.compile=false")  # the pretence has no compiler
    if recipe != "demo":
        sets.append("target.layer_ids=[0, 1, 2]")
    return tiny_run(store, *sets, recipe=recipe)


@pytest.mark.parametrize("recipe", ["demo", "eagle3-demo"])
def test_training_on_batches_sent_ahead_is_that_on_the_host(
    captured: Path, gpu: GpuPretence, recipe: str
):
    """They were copied from pageable memory, on the stream of the step: each copy stood in line
    behind all of its work, and the host with it.
    """
    cache = HiddenCache(Run(tiny_run(captured)).artifact("hidden"))
    config = config_of(captured, recipe)
    wanted, of_host, _ = trained(cache, config, HOST)
    found, gradients, throughput = trained(cache, config, CUDA)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients, of_host, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert gpu.order.errors == []
    assert throughput.read(NUM_STEPS).data_wait_share >= 0


def test_no_copy_of_a_batch_is_waited_for_by_the_host(captured: Path, gpu: GpuPretence):
    config = config_of(captured, "demo")
    cache = HiddenCache(Run(config).artifact("hidden"))
    draft, data = make_draft(config, cache, HOST), StepData(cache, config, World(0, 1, CUDA))
    data.begin(0)
    list(data.batches(0, draft.plan))  # what is sent once for all
    gpu.waits.clear()
    for step in (1, 2):
        assert all(batch.context.is_cuda for batch, _ in data.batches(step, draft.plan))
    assert set(gpu.waits) <= {"event"}  # the thread that makes them, for memory
    assert gpu.order.errors == []


@pytest.mark.parametrize("name", CODECS)
def test_no_copy_of_stored_states_is_waited_for_by_the_host(gpu: GpuPretence, name: str):
    states = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    codec: Codec = make_codec(
        name, num_layers=2, hidden_size=16, channel_scale=channel_scale(states)
    )
    stored = EncodedTensor(codec, codec.quantize(states))
    wanted = stored.decode()
    for _ in range(2):  # a scale of channels is sent at the first
        gpu.waits.clear()
        found = stored.decode(device=CUDA, out=torch.zeros(40, 32).bfloat16().to(CUDA))
        gpu.waits.subtract({"pageable copy": 1})  # of `out`
    assert gpu.waits.total() == 0
    assert torch.equal(found.cpu(), wanted)


def made(num: float) -> Tensor:
    return torch.full((4,), num, device=CUDA)


def test_what_was_sent_is_complete_before_it_is_worked_with(gpu: GpuPretence):
    stream = CopyStream[Tensor](CUDA)
    sent = stream.send(lambda: made(2.0))
    with pytest.raises(Unordered):
        sent.value + 1
    assert (stream.take(sent) + 1).tolist() == [3.0] * 4
    assert gpu.waits == {"read": 1}  # of the test


def test_its_memory_is_used_again_after_the_work_with_it_has_ended(gpu: GpuPretence):
    stream = CopyStream[Tensor](CUDA)
    sent = stream.send(lambda: made(2.0))
    seen, value = weakref.ref(sent.value), stream.take(sent)
    total = value.sum()
    stream.give_back(sent)
    del sent, value
    assert seen() is not None, "the sum may not have been computed yet"

    def next_one() -> Tensor:
        assert seen() is None, "room for one, and not for two"
        return made(3.0)

    sent = stream.send(next_one)
    assert gpu.waits == {"event": 1}  # in the thread that sends
    assert gpu.order.errors == []
    stream.give_back(sent)
    assert total.tolist() == 8.0


def test_without_its_event_the_memory_would_be_used_again_too_early(
    gpu: GpuPretence, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(CopyStream, "give_back", lambda *_: None)
    stream = CopyStream[Tensor](CUDA)
    sent = stream.send(lambda: made(2.0))
    stream.take(sent).sum()
    stream.give_back(sent)
    del sent
    assert len(gpu.order.errors) == 1


def test_the_time_waited_for_a_copy_is_time_without_data(gpu: GpuPretence):
    stream, throughput = CopyStream[Tensor](CUDA), Throughput(CUDA, first=0, total=1)
    sent: Sent[Tensor] = stream.send(lambda: made(2.0))
    assert sent.ready is not None
    ready: Any = sent.ready
    for _ in throughput.waiting(stream.take(each) for each in [sent]):
        pass
    (began, ended), _ = throughput._waits
    (copied,) = [own for own in ready.reached if own is not gpu.order.default]
    assert copied not in began.reached
    assert ended.reached[copied] == ready.reached[copied]


def test_states_that_another_thread_computes_stay_on_its_stream(gpu: GpuPretence):
    stream = CopyStream[Tensor](CUDA, shared=True)
    computed = made(1.0)
    sent = stream.send(lambda: computed * 2)  # by another stream, this would be out of order
    assert stream.take(sent).tolist() == [2.0] * 4


def test_batches_of_a_source_that_computes_are_made_on_its_stream(captured: Path, gpu: GpuPretence):
    assert OnlineStates.computes
    config = config_of(captured, "demo")
    streams = []
    for computes in (False, True):
        cache = HiddenCache(Run(config).artifact("hidden"))
        cache.computes = computes
        streams.append(StepData(cache, config, World(0, 1, CUDA))._stream._stream)
    assert streams[0] is not gpu.order.default
    assert streams[1] is gpu.order.default


def test_on_a_cpu_there_is_nothing_to_wait_for():
    stream = CopyStream[list[int]](HOST)
    sent = stream.send(lambda: [1])
    assert stream.take(sent) == [1]
    stream.give_back(sent)
    assert sent.ready is None
