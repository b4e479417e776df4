"""How flex attention's kernels are cut, so that they fit into a GPU's shared memory."""

from functools import lru_cache
from typing import Any

import torch

KernelOptions = dict[str, int | bool]

# Bytes for a block on an A100; H100 and B200 have more, all other cards of their age 101,376.
LARGE = 166_912


@lru_cache
def kernel_options(device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelOptions:
    """The options of flex attention on this GPU; see `options_for`."""
    properties: Any = torch.cuda.get_device_properties(device)
    return options_for(properties.shared_memory_per_block_optin, dtype, head_dim)


def options_for(shared_memory: int, dtype: torch.dtype, head_dim: int) -> KernelOptions:
    """Options for a GPU with `shared_memory` bytes for a block; PyTorch's own where they fit.

    `num_stages` is how many tiles of keys and values are there at a time: one is computed with
    while the others are fetched.
    """
    # PyTorch's kernel for fewer than 128 queries has no configuration for most grouped heads.
    options: KernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
    if head_dim > 256 and shared_memory >= LARGE:
        options["fwd_num_stages"] = 2
        if dtype != torch.float32:  # PyTorch's 16 are slow, and float32 has room for no more
            options |= {f"bwd_BLOCK_{side}": 32 for side in ("M1", "N1", "M2", "N2")}
    elif head_dim >= 128 and shared_memory < LARGE:
        row = dtype.itemsize << (head_dim - 1).bit_length()  # bytes, as the kernel pads heads
        options |= {
            "fwd_BLOCK_M": max(16, 32_768 // row),
            "fwd_BLOCK_N": max(16, 16_384 // row),
            "fwd_num_stages": 2 if row <= 1024 else 1,
        }
    return options
