"""Attention of targets: an entry of our own in transformers' attention interface, and the choice
of flash-attention where all of a target fits it.

transformers repeats keys and values for the heads that share them as soon as a mask is given. Here
those heads become further queries of one head, so that a cache is read where it lies. B rows, q
queries, k keys, H heads, G key-value heads, r = H / G, E head dimension.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deepspec.errors import ConfigError

log = logging.getLogger(__name__)

# transformers refuses a name with "sdpa" for models that do not compute plain softmax attention
GROUPED = "sdpa_grouped"
EAGER = "eager_rows"  # the model's own formula
BEYOND_SOFTMAX = "softcap", "s_aux"  # what layers give to attention that does more
FLASH = "flash_attention_2"
FLASH_HEAD_DIM = 256  # the widest head of flash-attention 2, PyTorch's own copy of it included
FEW_QUERIES = 64  # a row, up to which a mask for every head of a group costs less than a pass each
ALIGNMENT = 16  # elements; PyTorch's kernels copy a bias whose rows are not aligned


class KeyMask:
    """The keys that each query sees, in the forms that attention layers need, each made once."""

    def __init__(self, visible: Tensor, *, window: int = 0) -> None:
        self.visible = visible  # [B or 1, 1, q, k] bool
        self.window = window  # keys that a query sees at most, itself included; 0: any number
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


def set_attention(decoder: Any, kernel: str) -> None:
    """Set a decoder's layers to `GROUPED` or `EAGER`, with masks of any kind or without.

    Raises:
        ValueError: `GROUPED`, and transformers knows that the model's attention is not plain
            softmax attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, partial(make_mask, uncached=sdpa_mask))
    AttentionInterface.register(EAGER, eager_attention)
    AttentionMaskInterface.register(EAGER, partial(make_mask, uncached=eager_mask))
    decoder.set_attn_implementation(kernel)


@contextmanager
def own_attention(decoder: Any) -> Iterator[None]:
    """Within it the decoder's layers compute their own formula, as transformers does it."""
    kernel = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(kernel)


def make_mask(
    *, uncached: Callable[..., Any], q_offset: Any, use_vmap: bool = False, **settings: Any
) -> KeyMask | Tensor | None:
    """The mask of one kind of layer, as the model's own code asks transformers for it.

    With a cache of ours that is its offset, and makes the mask of its rows.

    Raises:
        ConfigError: the model changes the mask by a function of its own.
    """
    if isinstance(q_offset, int | Tensor):
        return uncached(q_offset=q_offset, use_vmap=use_vmap, **settings)
    if use_vmap:
        raise ConfigError(
            "the target changes the mask of its attention by a function of its own, which decoding"
            " with a cache does not know",
            where="target.model",
            fix="choose another target for decoding in this process",
        )
    from transformers.masking_utils import causal_mask_function

    size, function = settings.get("local_size"), settings["mask_function"]
    windows = getattr(settings["config"], "sliding_window", None)
    mask: KeyMask = q_offset.key_mask(
        function,
        local_size=size,
        is_sliding=size is not None and size == windows,
        is_causal=function is causal_mask_function,
    )
    return mask


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyMask | Tensor | None,
    **settings: Any,
) -> Any:
    """What the module's own eager attention returns: sinks, caps and all that it computes."""
    if isinstance(attention_mask, KeyMask):
        attention_mask = attention_mask.bias(1, query.dtype)
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, **settings)


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

    Raises:
        ConfigError: the layer caps its scores, or has attention sinks.
    """
    if more := [name for name in BEYOND_SOFTMAX if settings.get(name) is not None]:
        raise ConfigError(
            f"attention with {more[0]} is more than a softmax",
            where="target.model",
            fix="load the target with load_target, which takes its own attention",
        )
    num_groups, num_queries = key.shape[1], query.shape[2]
    ratio = query.shape[1] // num_groups
    mask = KeyMask(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask
    causal = mask is None and num_queries > 1 and getattr(module, "is_causal", True)

    def attend_with(queries: Tensor, *, copies: int = 1, enable_gqa: bool = False) -> Tensor:
        return scaled_dot_product_attention(
            queries,
            key,
            value,
            None if mask is None else mask.bias(copies, query.dtype),
            is_causal=causal,
            scale=settings.get("scaling"),
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
    # of latent attention queries are wider than values
    names = ("head_dim", "qk_head_dim")
    widths = {getattr(part, name, None) for part in decoder.modules() for name in names}
    head_dims = sorted(width for width in widths if isinstance(width, int))
    try:
        if not head_dims:
            raise ValueError("the width of its heads is not known")
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
