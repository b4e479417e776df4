"""Tiny drafts of every kind with random weights, and batches for them."""

from typing import Any

import torch
from torch import Tensor

from deepspec.config.draft import (
    BlockDraftConfig,
    ConfidenceConfig,
    Eagle3DraftConfig,
    MarkovConfig,
)
from deepspec.model.checkpoint import build_draft
from deepspec.model.chunked_loss import Vocabulary
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss_terms import softcap
from deepspec.model.spec import DraftSpec

VOCAB, SIZE, LAYERS = 61, 32, [-1, 1, 2]

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # the fewest that a GPU's flex attention takes
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "initializer_range": 0.2,
}
TARGETS = {
    "qwen3": QWEN3,
    "gemma4": GEMMA4,
    "gemma4_with_values": {**GEMMA4, "attention_k_eq_v": False},
}


def dspark(kind: Any = "vanilla", **changes: Any) -> BlockDraftConfig:
    settings = {
        "markov": MarkovConfig(rank=6, kind=kind),
        "confidence": ConfidenceConfig(),
        **changes,
    }
    return BlockDraftConfig(
        algorithm="dspark", block_size=4, num_layers=2, num_anchors=3, **settings
    )


DFLASH = BlockDraftConfig(algorithm="dflash", block_size=4, num_layers=2, num_anchors=3)
CONTEXT = DFLASH.model_copy(update={"layout": "anchor_is_context"})
EAGLE3 = Eagle3DraftConfig(algorithm="eagle3", block_size=4, ttt_length=3)
CONFIGS = {
    "dflash": DFLASH,
    "vanilla": dspark(),
    "gated": dspark("gated"),
    "rnn": dspark("rnn"),
    "confidence_alone": dspark(markov=None, confidence=ConfidenceConfig(markov_features=False)),
    "context": CONTEXT,
    "context_rnn": dspark("rnn", layout="anchor_is_context"),
    "eagle3": EAGLE3,
}


def make_spec(config: Any = None, *, target: str = "qwen3", lowest: int = -1) -> DraftSpec:
    """`lowest` is the lowest layer to capture."""
    config = config or CONFIGS["vanilla"]
    lowest = 0 if config.algorithm == "eagle3" else lowest
    return DraftSpec.from_target(
        TARGETS[target],
        config,
        layer_ids=[max(layer, lowest) for layer in LAYERS],
        mask_token_id=VOCAB - 1,
    )


def make_draft(
    config: Any = None, *, target: str = "qwen3", lowest: int = -1, seed: int = 0
) -> Drafter:
    frozen = torch.randn(2, VOCAB, SIZE, generator=torch.Generator().manual_seed(seed + 1))
    spec = make_spec(config, target=target, lowest=lowest)
    return build_draft(spec, embed=frozen[0], lm_head=frozen[1] * 0.3, seed=seed)


def make_batch(lengths: tuple[int, ...] = (14, 9), *, seed: int = 0) -> TrainBatch:
    """Random samples whose second half is an answer."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    return TrainBatch(
        input_ids=torch.randint(0, VOCAB - 1, (num_tokens,), generator=generator),
        loss_mask=torch.cat([torch.arange(length) >= length // 2 for length in lengths]),
        lengths=torch.tensor(lengths),
        context=torch.randn(num_tokens, len(LAYERS) * SIZE, generator=generator),
        last_hidden=torch.randn(num_tokens, SIZE, generator=generator),
        seeds=tuple(range(len(lengths))),
    )


def taken(batch: TrainBatch, sample: int) -> TrainBatch:
    """One sample of a batch by itself."""
    ends = batch.lengths.cumsum(0)
    part = slice(int(ends[sample] - batch.lengths[sample]), int(ends[sample]))
    tensors = (tensor[part] for tensor in (batch.input_ids, batch.loss_mask))
    states = (tensor[part] for tensor in (batch.context, batch.last_hidden))
    return TrainBatch(
        *tensors, batch.lengths[sample : sample + 1], *states, batch.seeds[sample : sample + 1]
    )


def total_loss(draft: Drafter, batch: TrainBatch) -> Tensor:
    output = draft.loss(batch, draft.plan(batch))
    return output.numerator / output.denominator


def plain_logits(vocabulary: Vocabulary, states: Tensor, features: Tensor | None = None) -> Tensor:
    """Raw float32 logits [..., V] of normed states, by the plain formula."""
    logits = softcap(states @ vocabulary.lm_head.T, vocabulary.cap).float()
    if features is None or vocabulary.markov_w2 is None:
        return logits
    return logits + features @ vocabulary.markov_w2.T
