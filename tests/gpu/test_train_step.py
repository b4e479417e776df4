"""A training micro-batch on a GPU, as far as it can be seen without one: no tensor of the host
among those of the device, and how often the host waits.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.config.draft import TrainConfig
from deepspec.model import attention, block_draft, eagle3
from deepspec.train.distributed import World
from deepspec.train.step import StepMetrics, accumulate
from deepspec.train.strategy import Replicated
from tests.gpu.tagged import CUDA, GpuPretence
from tests.model.drafts import CONFIGS, make_batch, make_draft

# Waits in one micro-batch are at most these: PyTorch's, where it makes a mask of tiles.
WAITS = {"dflash": 2, "vanilla": 2, "eagle3": 6}


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


@pytest.mark.parametrize("name", WAITS)
def test_a_micro_batch_computes_what_it_does_on_the_host_and_waits_no_more_than_is_known(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    batch = make_batch((14, 9))
    on_host = trainer(name, torch.device("cpu"))
    wanted = accumulate(on_host, batch)
    for module in (block_draft, eagle3):
        monkeypatch.setattr(module, "training_path", lambda *_, **__: "flex")
    monkeypatch.setattr(attention, "flex_attention", masked_attention)
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    monkeypatch.setattr(attention, "kernel_options", lambda *_: None)  # of the real kernel
    with GpuPretence() as gpu:
        on_gpu = trainer(name, CUDA)
        moved = batch._replace(
            context=batch.context.to(CUDA), last_hidden=batch.last_hidden.to(CUDA)
        )
        accumulate(on_gpu, moved)  # tables are made at the first
        gpu.waits.clear()
        found = accumulate(on_gpu, moved)
        num_waits = gpu.num_waits
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
        for parameter, other in zip(
            on_gpu.strategy.parameters.values(), on_host.strategy.parameters.values(), strict=True
        ):
            twice = torch.tensor(parameter.grad.tolist())
            torch.testing.assert_close(twice, 2 * other.grad, rtol=1e-3, atol=1e-4)
    assert num_waits <= WAITS[name], gpu.waits
