"""A training micro-batch on a GPU, as far as it can be seen without one: no tensor of the host
among those of the device, and how often the host waits.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.config.draft import TrainConfig
from deepspec.model import attention, block_draft, chunked_loss, eagle3
from deepspec.model.drafter import TrainBatch
from deepspec.train.distributed import World
from deepspec.train.step import StepMetrics, accumulate
from deepspec.train.strategy import Replicated
from tests.gpu.tagged import CUDA, GpuPretence
from tests.model.drafts import CONFIGS, make_batch, make_draft

MOST_WAITS = 0  # of the host, in a micro-batch: 15 to 21 before plans were made on it


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, block_mask: Any, scale: float, **_: Any
) -> Tensor:
    """What the compiled kernel computes, which the pretence does not have."""
    num_queries, num_keys = (torch.arange(x.shape[2], device=x.device) for x in (queries, keys))
    seen = block_mask.mask_mod(0, 0, num_queries[:, None], num_keys)
    return torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )


def trainer(name: str, device: torch.device) -> Any:
    draft = make_draft(CONFIGS[name]).to(device)
    strategy = Replicated(draft, TrainConfig(compute_dtype="float32"), World(0, 1, device))
    return SimpleNamespace(strategy=strategy, metrics=StepMetrics())


def on_gpu(batch: TrainBatch) -> TrainBatch:
    """As training has it: the states on the device, what plans are made of on the host."""
    return batch._replace(context=batch.context.to(CUDA), last_hidden=batch.last_hidden.to(CUDA))


def take_path(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    for module in (block_draft, eagle3):
        monkeypatch.setattr(module, "training_path", lambda *_, **__: path)
    monkeypatch.setattr(attention, "flex_attention", masked_attention)
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    monkeypatch.setattr(attention, "kernel_options", lambda *_: None)  # of the real kernel
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cuda", 0)  # several chunks


# C++ makes the gradient of a part that nothing used on the host, since the pretence is of Python.
@pytest.mark.parametrize("name", [name for name in CONFIGS if "rnn" not in name])
def test_a_micro_batch_computes_what_it_does_on_the_host_which_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    batch = make_batch((14, 9))
    host = trainer(name, torch.device("cpu"))
    wanted = accumulate(host, batch)
    take_path(monkeypatch, "flex")
    with GpuPretence() as gpu:
        device, moved = trainer(name, CUDA), on_gpu(batch)
        accumulate(device, moved)  # tables are made at the first
        gpu.waits.clear()
        found = accumulate(device, moved)
        num_waits = gpu.num_waits
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
        for parameter, other in zip(
            device.strategy.parameters.values(), host.strategy.parameters.values(), strict=True
        ):
            twice = torch.tensor(parameter.grad.tolist())
            torch.testing.assert_close(twice, 2 * other.grad, rtol=1e-3, atol=1e-4)
    assert num_waits <= MOST_WAITS


@pytest.mark.parametrize("path", ["flex", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_every_draft_waits_for_nothing_on_either_path_of_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str
):
    """Without compiled attention it waited for every sample in each layer."""
    draft, batch = make_draft(CONFIGS[name]), make_batch((14, 9))
    with torch.no_grad():
        wanted = draft.loss(batch, draft.plan(batch)).numerator
    take_path(monkeypatch, path)
    with GpuPretence() as gpu, torch.no_grad():
        draft, moved = make_draft(CONFIGS[name]).to(CUDA), on_gpu(batch)
        draft.loss(moved, draft.plan(moved))
        gpu.waits.clear()
        found = draft.loss(moved, draft.plan(moved)).numerator
        num_waits = gpu.num_waits
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert num_waits <= MOST_WAITS
