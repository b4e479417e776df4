"""Of kernels that only a GPU has: functions that keep the same tensors, and compute nothing.

They are a module of their own because Dynamo looks up what they use where they were defined.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo import guards
from torch._inductor import config as inductor

from deepspec.model import attention, block_draft, chunked_loss, eagle3
from deepspec.target import attention as target_attention

rms_norm = F.rms_norm


class FlexKernel(torch.autograd.Function):
    """Keeps what flex attention's kernel does: also its output, and a sum for each query."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out, sums = torch.empty_like(queries), queries.new_empty(queries.shape[:3]).float()
        ctx.save_for_backward(queries, keys, values, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values, _, _ = ctx.saved_tensors
        return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


class NormKernel(torch.autograd.Function):
    """Keeps what CUDA's fused RMSNorm does: its input, the weight, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1]).float(), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def fused_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
    """As CUDA has it: under autocast in float32, and one kernel, unless it is compiled."""
    if torch.compiler.is_compiling():
        return rms_norm(x, shape, weight, eps)
    if torch.is_autocast_enabled("cuda"):
        x, weight = x.float(), None if weight is None else weight.float()
    return NormKernel.apply(x, weight)


def take_the_place_of_kernels() -> None:
    """Of those that the pretence does not have; and let compiled functions take fake tensors."""
    F.rms_norm = fused_norm
    # chunks as the arithmetic has them, on a GPU whose free memory nobody can ask for
    chunked_loss.chunk_elements = lambda _device: chunked_loss.CHUNK_ELEMENTS["cuda"]
    attention.compiled = lambda _: lambda q, k, v, **_: FlexKernel.apply(q, k, v)
    attention.kernel_options = lambda *_: None
    attention.tiles = lambda *_, **__: None
    target_attention.scaled_dot_product_attention = lambda q, k, v, *_, **__: q.new_empty(
        *q.shape[:-1], v.shape[-1]
    )
    for module in (block_draft, eagle3):
        module.training_path = lambda *_, **__: "flex"
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset
    )
    inductor.joint_graph_constant_folding = False  # it computes with real tensors
