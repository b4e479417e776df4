"""What a block drafter computes for blocks whose slots are given the labels as previous tokens.

K blocks, g block size, T tokens, m captured layers, D hidden size, V vocabulary.
"""

from typing import NamedTuple

from torch import Tensor

from deepspec.model.anchors import BlockPlan
from deepspec.model.block_draft import BlockDraft
from tests.model.drafts import plain_logits


class BlockOutputs(NamedTuple):
    """Of every slot of every block."""

    states: Tensor  # [K, g, D]
    logits: Tensor  # [K, g, V]
    confidence: Tensor | None  # [K, g] logits


def block_outputs(draft: BlockDraft, plan: BlockPlan, context: Tensor) -> BlockOutputs:
    """States, logits and confidence logits, given `context` [T, m * D]."""
    states, head = draft.block_states(context, plan), draft.markov_head
    previous = None if head is None else head.markov_w1(plan.previous)
    features = None if head is None or previous is None else head.features(states, previous)
    confidence = None if draft.confidence_head is None else draft.confidence_head(states, previous)
    w2 = None if head is None else head.markov_w2.weight
    logits = plain_logits(draft.vocabulary(w2), states, features)
    return BlockOutputs(states, logits, confidence)
