"""What every draft is to the training loop and to decoding, and the tensors that pass between them.

B batch (rows), T tokens, S samples, g block size, m captured layers, D hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import LossConfig
from deepspec.model.chunked_loss import Vocabulary
from deepspec.model.execution import Execution
from deepspec.model.host_copy import row_numbers, row_starts
from deepspec.model.kv_cache import moved_up
from deepspec.model.layers import Layers, RMSNorm, RotaryTable, Rotation, embedding_scale
from deepspec.model.loss import LossOutput
from deepspec.model.loss_terms import softcap
from deepspec.model.row_cache import RowCache
from deepspec.model.spec import DraftSpec


class TrainBatch(NamedTuple):
    """Samples of one micro-batch, one after the other, then maybe fill, which no loss counts.

    The states are on the device that trains; the rest belongs on the host, where plans are made.
    """

    input_ids: Tensor  # [T] long
    loss_mask: Tensor  # [T] bool
    lengths: Tensor  # [S] long, tokens of each sample
    context: Tensor  # [T, m * D]
    last_hidden: Tensor  # [T, D] after the target's final norm; zeros where not stored
    seeds: tuple[int, ...]  # of each sample's random choices


class Proposal(NamedTuple):
    """The block of g tokens that a draft proposes in each of B rows."""

    tokens: Tensor  # [B, g] long
    # [B, g, V] float32, the very distributions the tokens were drawn from; None at temperature 0
    probs: Tensor | None
    # [B, g] float32 in (0, 1): chance of acceptance, given that all before it are accepted
    confidence: Tensor | None


class DraftCache(RowCache):
    """A draft's keys and values of the verified tokens."""

    def __init__(self, draft: "Drafter", rows: int, capacity: int) -> None:
        super().__init__([0] * len(draft.layers), rows, capacity)
        self.table = draft.rotary(capacity, like=draft.fc.weight)
        # [B, D] Eagle3 goes on from its own last output; zeros for the others
        self._last_outputs = draft.fc.weight.new_zeros(rows, draft.spec.hidden_size)
        self.last_output = self._last_outputs

    def put(self, rows: Sequence[int], fresh: Self) -> None:
        """Give these rows to other sequences, prefilled in a cache of their own."""
        super().put(rows, fresh)
        self.last_output[self._numbers(rows)] = fresh.last_output

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        super().keep(rows)
        self.last_output = moved_up(self.last_output, self._numbers(rows))

    def restore(self) -> None:
        """Have all rows again, empty, of those of a cache with graphs that were dropped."""
        super().restore()
        self.last_output = self._last_outputs

    def rotation(self, num_new: int) -> Rotation:
        """Of the next `num_new` positions of every row.

        [n, 1, E], or [B, n, 1, E] where rows differ in length.
        """
        start = self.lengths[0]
        if self.device_step is None and min(self.lengths) == max(self.lengths):
            return self.table.at(slice(start, start + num_new))
        device = self.table.cos.device
        return self.table.at(self._row_starts() + torch.arange(num_new, device=device))

    def mask(self, num_new: int) -> Tensor | None:
        """Which of the keys that are read a row's new positions see, all of them alike
        [B, 1, 1, keys].

        None where rows are of one length, and see all of them.
        """
        if self.device_step is None and min(self.lengths) == max(self.lengths):
            return None
        keys = torch.arange(self.end(num_new), device=self.table.cos.device)
        return (keys < self._row_starts() + num_new)[:, None, None]

    def _row_starts(self) -> Tensor:
        if self.device_step is not None:
            return self.device_step.starts
        return row_starts(tuple(self.lengths), self.table.cos.device)

    def _numbers(self, rows: Sequence[int]) -> Tensor:
        return row_numbers(tuple(rows), self.last_output.device)


class Drafter(nn.Module, ABC):
    """A draft model: DFlash and DSpark (`BlockDraft`) or Eagle3 (`Eagle3Draft`).

    Embedding and lm_head are the target's, and frozen.
    """

    layers: Layers
    norm: RMSNorm

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        self.spec, self.execution = spec, Execution()
        self.block_size = spec.block_size  # tokens proposed per round
        self.num_queries = spec.num_queries  # positions that a proposal writes into its cache
        self.embed_tokens = nn.Embedding(spec.vocab_size, size)
        self.lm_head = nn.Linear(size, spec.vocab_size, bias=False)
        self.fc = nn.Linear(spec.num_context_features, size, bias=False)
        self.rotary = RotaryTable(spec.rope, spec.heads.head_dim)
        for frozen in (self.embed_tokens, self.lm_head):
            frozen.weight.requires_grad = False
        self.embedded_dtype: torch.dtype | None = None  # None: that of the embedding's weight

    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Keep embedding and lm_head in `dtype`; what comes out of them is of the dtype as before.

        Memory alone changes where training computes in `dtype`, and the target's weights are of it:
        then no value is rounded.
        """
        self.embedded_dtype = self.embed_tokens.weight.dtype
        self.embed_tokens.to(dtype)
        self.lm_head.to(dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings [..., D] of tokens [...], scaled where the target's family scales them."""
        embedded = self.embed_tokens(token_ids)
        if self.embedded_dtype is not None:
            embedded = embedded.to(self.embedded_dtype)
        if not self.spec.family.scaled_embeddings:
            return embedded
        return embedded * embedding_scale(self.spec.hidden_size, embedded.dtype)

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [..., V] of final-normed states [..., D]."""
        lm_head = self.lm_head.weight.to(normed.dtype)
        return softcap(F.linear(normed, lm_head), self.spec.logit_softcap)

    def vocabulary(self, markov_w2: Tensor | None = None) -> Vocabulary:
        """What the loss needs to turn states, and Markov features, into logits."""
        cap, compile = self.spec.logit_softcap, self.execution.compile
        return Vocabulary(self.lm_head.weight, markov_w2, cap, compile)

    # Training

    @property
    @abstractmethod
    def loss_weights(self) -> dict[str, float]:
        """Weight of each of `LossOutput.numerators`."""

    def configure_loss(self, settings: LossConfig) -> None:
        """Set the weights of the loss terms; without effect on a draft that has only one term."""

    @abstractmethod
    def plan(self, batch: TrainBatch) -> Any:
        """Everything about a batch's loss that needs no forward pass; each algorithm has its own.

        Made on the host and sent to the device of the states, which nothing waits for. Random
        choices follow from `batch.seeds`.
        """

    @abstractmethod
    def loss(self, batch: TrainBatch, plan: Any) -> LossOutput:
        """Forward pass and loss sums; without supervised tokens they are zeros with a graph."""

    # Decoding

    def new_cache(self, rows: int, capacity: int) -> DraftCache:
        """Empty cache for rows of at most `capacity` verified tokens; a block's room is added.

        Its dtype and device are those of the weights.
        """
        return DraftCache(self, rows, capacity + self.num_queries)

    @torch.no_grad()  # a graph through the cache would grow from round to round
    def extend(
        self, cache: DraftCache, context: Tensor, next_tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """Append the first counts[b] positions of `context` [B, n, m * D] to row b of the cache.

        They are the prompt's, or those verified in a round; what a proposal left in the cache is
        overwritten. `next_tokens` [B, n] is the token that follows each position; block drafters
        do not use it.
        """
        longest = max(counts)
        if longest == 0:
            return

        def append(context: Tensor, next_tokens: Tensor, added: Tensor) -> tuple[()]:
            self._append(cache, context, next_tokens, added, counts)
            return ()

        # what is written behind a row's end is overwritten
        width = longest if cache.graphs is None else context.shape[1]
        added = row_numbers(tuple(counts), context.device)
        inputs = context[:, :width], next_tokens[:, :width], added
        cache.run("extend", append, inputs, num_new=width)
        cache.lengths = [sum(both) for both in zip(cache.lengths, counts, strict=True)]

    @torch.no_grad()
    def propose(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """Draft the tokens that follow `anchor` [B] long, which is at position lengths[b].

        `uniforms` [B, g] in [0, 1) decide the draws; without them, or at temperature 0, the
        likeliest tokens are taken.
        """

        def draft(anchor: Tensor, uniforms: Tensor | None) -> Proposal:
            return self._draft(cache, anchor, sampling, uniforms)

        inputs = anchor, uniforms
        return Proposal(
            *cache.run("propose", draft, inputs, num_new=self.num_queries, variant=sampling)
        )

    @abstractmethod
    def _append(
        self,
        cache: DraftCache,
        context: Tensor,
        next_tokens: Tensor,
        added: Tensor,
        counts: Sequence[int],
    ) -> None:
        """Write the n positions of `extend`, of which `added` [B] long, as `counts`, stay."""

    @abstractmethod
    def _draft(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """What `propose` returns."""
