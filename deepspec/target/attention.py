"""Attention of targets: an entry of our own in transformers' attention interface, and the choice
of flash-attention where all of a target fits it.

transformers repeats keys and values for the heads that share them as soon as a mask is given. Here
those heads become further queries of one head, so that a cache is read where it lies. B rows, q
queries, k keys, H heads, G key-value heads, r = H / G, E head dimension.
"""

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

# transformers refuses a name with "sdpa" for models that do not compute plain softmax attention
GROUPED = "sdpa_grouped"
FLASH = "flash_attention_2"
FLASH_HEAD_DIM = 256  # the widest head of flash-attention 2, PyTorch's own copy of it included
FEW_QUERIES = 64  # a row, up to which a mask for every head of a group costs less than a pass each
ALIGNMENT = 16  # elements; PyTorch's kernels copy a bias whose rows are not aligned


class KeyMask:
    """The keys that each query sees, in the forms that attention layers need, each made once."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible  # [B or 1, 1, q, k] bool
        self._biases: dict[tuple[int, torch.dtype], Tensor] = {}
        self._elsewhere: dict[Any, KeyMask] = {}

    def to(self, device: Any, **_: Any) -> "KeyMask":
        """The mask on another device, made once: accelerate asks for it at every layer there."""
        if device not in self._elsewhere:
            self._elsewhere[device] = KeyMask(self.visible.to(device))
        return self._elsewhere[device]

    def bias(self, ratio: int, dtype: torch.dtype) -> Tensor:
        """[B or 1, 1, ratio * q, k]: 0 where a key is seen, else minus infinity; the queries of a
        group's first head, then those of its next.
        """
        if (ratio, dtype) not in self._biases:
            hidden = ~self.visible.repeat(1, 1, ratio, 1)
            num_keys = hidden.shape[-1]
            width = -(-num_keys // ALIGNMENT) * ALIGNMENT
            rows = torch.zeros(*hidden.shape[:3], width, dtype=dtype, device=hidden.device)
            self._biases[ratio, dtype] = rows[..., :num_keys].masked_fill_(hidden, -torch.inf)
        return self._biases[ratio, dtype]


def use_grouped_attention(decoder: Any) -> None:
    """Set a decoder's layers to `grouped_attention`, with masks of any kind or without."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    decoder.set_attn_implementation(GROUPED)


def grouped_attention(
    module: Any,
    query: Tensor,  # [B, H, q, E]
    key: Tensor,  # [B, G, k, E]
    value: Tensor,  # [B, G, k, E]
    attention_mask: KeyMask | Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, q, H, E] for a layer of transformers, which also takes weights: none.

    Keys and values are not copied. Without a mask it is causal where the layer is.
    """
    num_groups, num_queries = key.shape[1], query.shape[2]
    ratio = query.shape[1] // num_groups
    mask = KeyMask(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask
    causal = mask is None and num_queries > 1 and module.is_causal

    def attend_with(queries: Tensor, *, copies: int = 1, enable_gqa: bool = False) -> Tensor:
        return scaled_dot_product_attention(
            queries,
            key,
            value,
            None if mask is None else mask.bias(copies, query.dtype),
            is_causal=causal,
            scale=settings["scaling"],
            enable_gqa=enable_gqa,
        )

    if ratio == 1 or (mask is None and _kernel_groups(query)):
        out = attend_with(query, enable_gqa=ratio > 1)
    elif num_queries <= FEW_QUERIES and not causal:
        folded = query.unflatten(1, (num_groups, ratio)).flatten(2, 3)
        out = attend_with(folded, copies=ratio).unflatten(2, (ratio, num_queries)).flatten(1, 2)
    else:
        heads = query.unflatten(1, (num_groups, ratio)).unbind(2)
        out = torch.stack([attend_with(head) for head in heads], 2).flatten(1, 2)
    return out.transpose(1, 2).contiguous(), None


def _kernel_groups(query: Tensor) -> bool:
    """Whether PyTorch's kernel itself knows heads that share keys.

    On a GPU flash-attention does; the plain formula, which takes over where that does not fit,
    holds a score for every pair of tokens.
    """
    fits_flash = query.dtype != torch.float32 and query.shape[-1] <= FLASH_HEAD_DIM
    return query.device.type != "cuda" or fits_flash


def use_flash_attention(decoder: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Set a decoder's layers to flash-attention where it is installed and fits all of them.

    Where it is installed and does not serve, that is logged with the reason and what it costs.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if not installed or device.type != "cuda" or dtype != torch.bfloat16:
        return
    head_dims = sorted({layer.self_attn.head_dim for layer in decoder.layers})
    try:
        if head_dims[-1] > FLASH_HEAD_DIM:
            raise ValueError(f"heads of {head_dims[-1]} are wider than {FLASH_HEAD_DIM}")
        for head_dim in head_dims:
            probe_flash_attention(head_dim, device)
        decoder.set_attn_implementation(FLASH)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        log.warning(
            "target attention=%s FALLBACK: flash-attention is installed and cannot be used, rows"
            " are padded to the longest of their batch instead of packed: %s",
            GROUPED,
            str(error).strip().partition("\n")[0],
        )


def probe_flash_attention(head_dim: int, device: torch.device) -> None:
    """Run flash-attention once, forward, and wait for it; raises what importing or running it does.

    A build for another CUDA or another PyTorch fails as it is imported, one without kernels for
    this GPU as it runs.
    """
    from flash_attn import flash_attn_func

    heads = torch.zeros(1, 128, 1, head_dim, dtype=torch.bfloat16, device=device)
    flash_attn_func(heads, heads, heads, causal=True)
    torch.cuda.synchronize(device)
