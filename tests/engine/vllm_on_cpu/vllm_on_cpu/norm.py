"""The norms of a block draft's context keys, each layer's with its own weight.

vLLM norms the keys of all layers with one call, whose kernel for the CPU reads the first row of a
weight [layers, head dimension] only. Drafts of more than one layer would propose nonsense.
"""

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model


def mend() -> None:
    """Called by vLLM in each of its processes."""
    DFlashQwen3Model._normalize_context_k = _by_layer


def _by_layer(model: DFlashQwen3Model, keys: torch.Tensor) -> torch.Tensor:
    normed = torch.empty_like(keys)
    for layer, weight in enumerate(model._k_norm_weights):
        ops.rms_norm(normed[layer], keys[layer], weight, model._rms_norm_eps)
    return normed
