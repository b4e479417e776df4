"""Attention of one batch of training, forward and backward, with tensors as drafts have them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.model.attention import BlockVisibility, attend


def run_batch(heads: Sequence[int], dtype: torch.dtype, batch: Sequence[int]) -> None:
    """`heads`: their number, that of key-value heads, their size; `batch`: blocks, block size,
    tokens, copies.
    """
    num_heads, num_kv_heads, head_dim = heads
    num_blocks, block_size, num_tokens, copies = batch
    num_slots = num_blocks * block_size

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, head_dim, device="cuda", dtype=dtype, requires_grad=True)

    context, *own = (
        (random(num_kv_heads, num), random(num_kv_heads, num))
        for num in (num_tokens, *[num_slots] * copies)
    )
    first = torch.zeros(num_blocks, dtype=torch.long)
    visibility = BlockVisibility(first, first + num_tokens, block_size, "flex")
    queries = random(num_slots, num_heads)
    attend(queries, context, own, visibility, scale=head_dim**-0.5).sum().backward()
