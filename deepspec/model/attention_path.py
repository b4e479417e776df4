"""Which attention training takes: compiled flex attention where a probe works, else dense."""

import importlib
import logging
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor

from deepspec.config.families import HeadGeometry
from deepspec.model.attention import BlockVisibility, flex
from deepspec.model.execution import compute_dtype

log = logging.getLogger(__name__)

PROBE_TOKENS, PROBE_BLOCK = 128, 8


def training_path(weight: Tensor, heads: HeadGeometry) -> Literal["flex", "dense"]:
    """Which attention training takes on this device and dtype; probed and logged once."""
    device = weight.device
    if device.type != "cuda":
        return _dense(device.type)
    return _choose(device.type, compute_dtype(weight), heads)


@lru_cache
def _dense(device: str) -> Literal["dense"]:
    log.info(
        "training attention=dense device=%s (flex attention has no backward pass there)", device
    )
    return "dense"


@lru_cache
def _choose(device: str, dtype: torch.dtype, heads: HeadGeometry) -> Literal["flex", "dense"]:
    try:
        probe(device, dtype, heads)
    except _kernel_errors() as error:
        reason = str(error).strip().partition("\n")[0]
        log.warning(
            "training attention=dense device=cuda FALLBACK: "
            "compiled flex attention fails here, memory grows: %s",
            reason,
        )
        return "dense"
    log.info(
        "training attention=flex (compiled) device=cuda dtype=%s head_dim=%d", dtype, heads.head_dim
    )
    return "flex"


def probe(device: str, dtype: torch.dtype, heads: HeadGeometry) -> None:
    """Run a small forward and backward pass of flex attention; raises what its compiler does."""
    starts = torch.zeros(2, dtype=torch.long, device=device)
    visibility = BlockVisibility(
        starts, starts + torch.tensor([3, 60], device=device), PROBE_BLOCK, "flex"
    )
    shapes = (
        (2 * PROBE_BLOCK, heads.num_heads),
        *[(heads.num_kv_heads, length) for length in (PROBE_TOKENS, 2 * PROBE_BLOCK)],
    )
    with torch.enable_grad():
        queries, context, own = (
            torch.ones(1, *shape, heads.head_dim, device=device, dtype=dtype, requires_grad=True)
            for shape in shapes
        )
        flex(queries, (context, context), [(own, own)], visibility, scale=1.0).sum().backward()


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What torch's compiler and Triton raise for a kernel that does not fit the device."""
    try:
        triton = importlib.import_module("triton.runtime.errors")
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, cast("type[Exception]", triton.TritonError))
