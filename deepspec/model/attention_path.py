"""Which attention training takes: compiled flex attention where a probe works, else dense."""

import logging
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from deepspec.config.families import HeadGeometry
from deepspec.model.attention import BlockVisibility, attend
from deepspec.model.execution import compiler_errors, compute_dtype
from deepspec.model.spec import DraftSpec
from deepspec.process.machine import missing_for_triton

log = logging.getLogger(__name__)

# More than 128 queries; and no two sizes are alike, since equal ones would be compiled as one.
PROBE_TOKENS, PROBE_SLOTS = 300, 140


def training_path(weight: Tensor, spec: DraftSpec, *, block_size: int) -> Literal["flex", "dense"]:
    """Which attention training takes on this device and dtype; probed and logged once."""
    if weight.device.type == "cuda":
        return _probed(compute_dtype(weight), spec.heads, spec.attention_scale, block_size)
    return _without_flex(weight.device.type)


@lru_cache
def _without_flex(device: str) -> Literal["dense"]:
    log.info(
        "training attention=dense device=%s (flex attention has no backward pass there)", device
    )
    return "dense"


@lru_cache
def _probed(
    dtype: torch.dtype, heads: HeadGeometry, scale: float, block_size: int
) -> Literal["flex", "dense"]:
    try:
        probe(dtype, heads, scale, block_size)
    except torch.OutOfMemoryError:
        raise  # it tells nothing about the kernels, and the other path needs more
    except compiler_errors() as error:
        log.warning(
            "training attention=dense device=cuda FALLBACK: compiled flex attention fails here "
            "(dtype=%s head_dim=%d). The cost: %d bytes for every query and every token of its "
            "sample, in each layer, and slower steps. Reason: %s",
            dtype,
            heads.head_dim,
            4 * heads.num_heads,
            str(error).strip().partition("\n")[0],
        )
        if lacks := " and ".join(missing_for_triton()):
            log.warning("compiled kernels need %s, not found here: docs/gpu.md", lacks)
        return "dense"
    log.info(
        "training attention=flex (compiled) device=cuda dtype=%s head_dim=%d", dtype, heads.head_dim
    )
    return "flex"


def probe(dtype: torch.dtype, heads: HeadGeometry, scale: float, block_size: int) -> None:
    """Run a forward and backward pass of flex attention; raises what its compiler does.

    Batches of more than one tile of queries then find it compiled.
    """
    num_blocks = -(-PROBE_SLOTS // block_size)
    num_slots = num_blocks * block_size
    first = torch.zeros(num_blocks, dtype=torch.long)
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
        visibility = BlockVisibility(first, first + PROBE_TOKENS, block_size, "flex")
        attend(queries, (context, context), [(own, own)], visibility, scale=scale).sum().backward()
