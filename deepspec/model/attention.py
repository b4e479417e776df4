"""Attention of training blocks: compiled flex attention where it works, dense masks with SDPA elsewhere.

Dense masks cost A * g * (T + A * g) bytes a sample and compute every score; flex skips what no slot sees.
B batch, T tokens, A anchors, g block size, H heads, K key-value heads, E head dimension, n queries, L keys.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from deepspec.families import HeadGeometry
from deepspec.model.anchors import Anchors, block_mask

log = logging.getLogger(__name__)

Mask = Tensor | BlockMask
PROBE_TOKENS, PROBE_BLOCK = 128, 8


def visibility(anchors: Anchors, *, num_tokens: int, block_size: int, path: Literal["flex", "dense"]) -> Mask:
    """What each block slot sees (DSpark eq. 3), as the path's attention takes it."""
    if path == "dense":
        return block_mask(anchors, num_tokens=num_tokens, block_size=block_size)
    starts = anchors.positions
    # A number captured as such would be compiled in, and every new length would compile again.
    width = torch.tensor(num_tokens, device=starts.device)

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        own = (key >= width) & ((key - width) // block_size == block)
        return (key < starts[row, block]) | own  # an anchor lies within the context, so the first half never reaches the blocks

    num_rows, num_blocks = starts.shape
    num_queries = num_blocks * block_size
    # Anchors ascend: neighbouring blocks see almost the same context, and most 128 x 128 tiles are seen whole or not at all.
    return create_block_mask(sees, B=num_rows, H=None, Q_LEN=num_queries, KV_LEN=num_tokens + num_queries, device=starts.device)


def flex(queries: Tensor, keys: Tensor, values: Tensor, *, mask: BlockMask, scale: float) -> Tensor:
    """Attention output [B, H, n, E] of queries [B, H, n, E] over keys and values [B, K, L, E]."""
    device = values.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
    # Autocast knows SDPA but not flex, and rotated queries come in the tables' float32.
    cast_inputs = (x.to(dtype) for x in (queries, keys, values))
    kernel: Any = _compiled() if values.is_cuda else flex_attention
    shares = queries.shape[1] != keys.shape[1]
    return cast("Tensor", kernel(*cast_inputs, block_mask=mask, scale=scale, enable_gqa=shares))


@lru_cache
def _compiled() -> Callable[..., Tensor]:
    # Not compiled, flex attention computes dense scores and saves nothing (trap D10). Lengths differ from batch to batch.
    return cast("Callable[..., Tensor]", torch.compile(flex_attention, dynamic=True))


def training_path(weight: Tensor, heads: HeadGeometry) -> Literal["flex", "dense"]:
    """Which attention training takes on this device, for the dtype it computes in; probed and logged once."""
    device = weight.device
    if device.type != "cuda":
        return _dense(device.type)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    return _choose(device.type, dtype, heads)


@lru_cache
def _dense(device: str) -> Literal["dense"]:
    log.info("training attention=dense device=%s (flex attention has no backward pass there)", device)
    return "dense"


@lru_cache
def _choose(device: str, dtype: torch.dtype, heads: HeadGeometry) -> Literal["flex", "dense"]:
    try:
        probe(device, dtype, heads)
    except _kernel_errors() as error:
        reason = str(error).strip().partition("\n")[0]
        log.warning("training attention=dense device=cuda FALLBACK: compiled flex attention fails here, memory grows: %s", reason)
        return "dense"
    log.info("training attention=flex (compiled) device=cuda dtype=%s head_dim=%d", dtype, heads.head_dim)
    return "flex"


def probe(device: str, dtype: torch.dtype, heads: HeadGeometry) -> None:
    """One small forward and backward pass of flex attention; raises what its compiler or its kernel raises."""
    anchors = Anchors(torch.tensor([[3, 60]], device=device), torch.ones(1, 2, dtype=torch.bool, device=device))
    mask = visibility(anchors, num_tokens=PROBE_TOKENS, block_size=PROBE_BLOCK, path="flex")
    shapes = ((heads.num_heads, 2 * PROBE_BLOCK), *[(heads.num_kv_heads, PROBE_TOKENS + 2 * PROBE_BLOCK)] * 2)
    with torch.enable_grad():
        tensors = [torch.ones(1, *shape, heads.head_dim, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        flex(*tensors, mask=cast("BlockMask", mask), scale=1.0).sum().backward()


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel that does not fit the device raises: torch's compiler a RuntimeError, Triton an error of its own."""
    try:
        triton = importlib.import_module("triton.runtime.errors")
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, cast("type[Exception]", triton.TritonError))
