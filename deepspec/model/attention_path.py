"""Which attention training takes: compiled flex attention where a probe works, else dense."""

import importlib
import logging
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor

from deepspec.config.families import HeadGeometry
from deepspec.model.attention import BlockVisibility, attend
from deepspec.model.execution import compute_dtype

log = logging.getLogger(__name__)

PROBE_TOKENS, PROBE_BLOCK = 128, 8


def training_path(weight: Tensor, heads: HeadGeometry) -> Literal["flex", "dense"]:
    """Which attention training takes on this device and dtype; probed and logged once."""
    if weight.device.type == "cuda":
        return _probed(compute_dtype(weight), heads)
    return _without_flex(weight.device.type)


@lru_cache
def _without_flex(device: str) -> Literal["dense"]:
    log.info(
        "training attention=dense device=%s (flex attention has no backward pass there)", device
    )
    return "dense"


@lru_cache
def _probed(dtype: torch.dtype, heads: HeadGeometry) -> Literal["flex", "dense"]:
    try:
        probe(dtype, heads)
    except _kernel_errors() as error:
        log.warning(
            "training attention=dense device=cuda FALLBACK: "
            "compiled flex attention fails here, memory grows: %s",
            str(error).strip().partition("\n")[0],
        )
        return "dense"
    log.info(
        "training attention=flex (compiled) device=cuda dtype=%s head_dim=%d", dtype, heads.head_dim
    )
    return "flex"


def probe(dtype: torch.dtype, heads: HeadGeometry) -> None:
    """Run a small forward and backward pass of flex attention; raises what its compiler does."""
    first, last = torch.tensor([[0, 0], [3, 60]], device="cuda")
    num_slots = 2 * PROBE_BLOCK
    shapes = (
        (num_slots, heads.num_heads),
        (heads.num_kv_heads, PROBE_TOKENS),
        (heads.num_kv_heads, num_slots),
    )
    with torch.enable_grad():
        queries, context, own = (
            torch.ones(1, *shape, heads.head_dim, device="cuda", dtype=dtype, requires_grad=True)
            for shape in shapes
        )
        visibility = BlockVisibility(first, last, PROBE_BLOCK, "flex")
        attend(queries, (context, context), [(own, own)], visibility, scale=1.0).sum().backward()


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What torch's compiler and Triton raise for a kernel that does not fit the device."""
    try:
        triton = importlib.import_module("triton.runtime.errors")
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, cast("type[Exception]", triton.TritonError))
