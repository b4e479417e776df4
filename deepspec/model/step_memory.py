"""Bytes that a training step of a draft holds on a GPU, by arithmetic from its settings alone.

Tests compare it with the sizes of all tensors of real steps. T tokens, N slots, P places (of
Eagle3), D hidden size, m captured layers, V vocabulary, r Markov rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from deepspec.config.draft import DraftConfig
from deepspec.config.resources import MemoryConfig
from deepspec.model.checkpoint import empty_draft
from deepspec.model.spec import DraftSpec

FLOAT32 = 4
BATCHES = 3  # on the device: in use, ready, and being made
LOGITS_COPIES = 8  # float32 tensors of a chunk's logits at a time


class StepSize(NamedTuple):
    """The largest micro-batch."""

    tokens: int
    slots: int  # tokens predicted

    @classmethod
    def of(cls, draft: DraftConfig, memory: MemoryConfig, longest: int) -> "StepSize":
        """Of a batch as large as it may be, or of one sample of `longest` tokens."""
        slots = min(memory.most_slots, memory.batch_tokens * draft.num_slots(1))
        return cls(max(memory.batch_tokens, longest), max(slots, draft.num_slots(longest)))


class LayerBytes:
    """What a draft's layer keeps of a slot (or token) for its backward pass.

    Not compiled, norms take float32, and autocast makes a copy of its input for every matrix
    product. Compiled, a function makes one, and what is cheap to compute again is not kept.
    """

    def __init__(self, spec: DraftSpec, *, item: int, compiled: bool) -> None:
        """`item` is the bytes of a number in matrix products."""
        heads, size = spec.heads, spec.hidden_size
        normed = item if compiled else FLOAT32
        kv_size = heads.num_kv_heads * heads.head_dim
        projections = 1 if heads.values_are_keys else 2

        def copies(products: int) -> int:
            return item * (1 if compiled else products) if item < FLOAT32 else FLOAT32

        self.residual = FLOAT32 * size
        self.read_by_keys, self.read_by_queries = copies(projections) * size, copies(1) * size
        self.key_norms = (1 + spec.family.value_norm) * normed * kv_size
        self.rotated = (FLOAT32 + item) * kv_size  # keys and values before attention takes them
        self.attended_keys = 2 * item * kv_size
        self.queries = heads.num_heads * ((normed + 2 * item) * heads.head_dim + FLOAT32)
        sandwich = 2 * normed if spec.family.sandwich_norms else 0
        inner = (3 if compiled else 4) * item * spec.intermediate_size
        self.after_attention = self.residual + (copies(2) + sandwich) * size + inner
        # gradients of the MLP's inner states, and of the residual stream
        self.working = 3 * item * spec.intermediate_size + self.residual


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank's training steps."""

    spec: DraftSpec
    item: int  # bytes of a number in matrix products
    frozen_item: int  # of embedding and lm_head
    compiled: bool
    recompute: bool
    chunk: int  # logits that the loss scores at a time

    @cached_property
    def num_trained(self) -> int:
        """Parameters that change."""
        draft = empty_draft(self.spec)
        return num_parameters(draft) - num_parameters(draft.embed_tokens, draft.lm_head)

    @property
    def frozen(self) -> int:
        """Embedding and lm_head."""
        return 2 * self.frozen_item * self.spec.vocab_size * self.spec.hidden_size

    def held(self, ranks: int, zero: MemoryConfig | None) -> int:
        """Weights, gradients and AdamW's state of one of `ranks`.

        Args:
            ranks: They all hold the same, or each a part by `zero`.
            zero: How DeepSpeed deals out; None where it does not.
        """
        master, moments, gradients = (part * FLOAT32 * self.num_trained for part in (1, 2, 1))
        if zero is None:
            return self.frozen + master + moments + gradients
        stepping = 0 if zero.offload != "none" else (master + moments) // ranks
        weights = 0 if zero.offload == "all" else self.item * self.num_trained
        if zero.zero_stage == 3:
            weights //= ranks
        if zero.zero_stage > 1:
            gradients //= ranks
        return self.frozen + weights + stepping + gradients

    @property
    def preflight(self) -> int:
        """A second draft with gradients and optimizer, on one short sample."""
        return self.frozen + 5 * FLOAT32 * self.num_trained + self._copied_weights + self._chunk

    def micro_batch(self, step: StepSize) -> int:
        """What a micro-batch adds to weights, gradients and optimizer."""
        size = self.spec.hidden_size
        batch = 2 * step.tokens * (self.spec.num_context_features + size)
        kept, working = self._eagle3(step) if self.spec.ttt_length else self._blocks(step)
        scored = self._chunk + FLOAT32 * size * step.slots  # normed states are there meanwhile
        return BATCHES * batch + self._copied_weights + kept + max(working, scored)

    @cached_property
    def _copied_weights(self) -> int:
        """Of the layers' matrices, in the number format of the products; of one layer where they
        are computed once more.
        """
        layers = num_parameters(empty_draft(self.spec).layers)
        if self.recompute:
            layers //= self.spec.num_layers
        return self.item * layers if self.item < FLOAT32 else 0

    @property
    def _chunk(self) -> int:
        """Logits of a chunk, and the gradient of the Markov head's table."""
        rank = self.spec.markov.rank if self.spec.markov else 0
        table = (FLOAT32 + self.item) * rank * self.spec.vocab_size
        return LOGITS_COPIES * FLOAT32 * self.chunk + table

    def _blocks(self, step: StepSize) -> tuple[int, int]:
        """What a block draft keeps, and what its backward pass works on at a time."""
        layer = LayerBytes(self.spec, item=self.item, compiled=self.compiled)
        num_layers, rank = self.spec.num_layers, self.spec.markov.rank if self.spec.markov else 0
        per_slot = layer.queries + layer.after_attention + layer.read_by_keys
        if self.item < FLOAT32:  # else the products read the same tensor
            per_slot += layer.read_by_queries
        # the row's fused states are read by all layers
        per_token = layer.read_by_keys
        shared = layer.key_norms + layer.attended_keys
        within = step.slots * (per_slot + shared) + step.tokens * (per_token + shared)
        kept = step.slots * (3 * layer.residual + 2 * FLOAT32 * rank)
        working = step.slots * layer.working
        if self.recompute:
            return kept + num_layers * step.slots * layer.residual, working + within
        return kept + num_layers * (within + step.slots * layer.residual), working

    def _eagle3(self, step: StepSize) -> tuple[int, int]:
        """The same of Eagle3, whose steps each read keys and values of those before."""
        layer = LayerBytes(self.spec, item=self.item, compiled=self.compiled)
        steps = self.spec.ttt_length
        places = step.slots // steps
        # attention's input is twice as wide: a token's embedding, and the state before it
        inputs = 2 * layer.residual + 2 * layer.read_by_keys + layer.key_norms
        kept = (step.tokens + (steps - 1) * places) * inputs + 2 * step.slots * layer.residual
        per_step = 2 * layer.read_by_queries + layer.queries + layer.after_attention
        keys = layer.attended_keys * (step.tokens + (steps - 1) * places)  # of the last step
        working = places * layer.working + (step.tokens + steps * places) * 2 * layer.rotated
        if self.recompute:
            kept += 2 * layer.residual * step.slots + layer.rotated * (step.tokens + step.slots)
            return kept, working + places * per_step + keys
        earlier = steps * step.tokens + steps * (steps - 1) // 2 * places
        return kept + step.slots * per_step + layer.attended_keys * earlier, working


def num_parameters(*modules: nn.Module) -> int:
    """Of all these modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
