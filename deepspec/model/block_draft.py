"""Block drafters: DFlash is the backbone alone, DSpark the same with a Markov and a confidence
head.

B batch, T tokens, K anchors, g block size, D hidden size, m captured layers, V vocabulary, r Markov
rank, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import LossConfig
from deepspec.model.anchors import BlockPlan, filled, plan_blocks, sample_anchors
from deepspec.model.attention import BlockVisibility
from deepspec.model.attention_path import training_path
from deepspec.model.chunked_loss import Targets
from deepspec.model.drafter import DraftCache, Drafter, Proposal, TrainBatch
from deepspec.model.execution import FILL_BLOCKS
from deepspec.model.heads import ConfidenceHead, MarkovHead, sample_block
from deepspec.model.layers import DecoderLayer, Layers, RMSNorm
from deepspec.model.loss import LossOutput, Slots, block_loss, zero_loss
from deepspec.model.sampling import distribution, draw
from deepspec.model.spec import DraftSpec
from deepspec.model.vocabulary import Vocabulary


class BlockDraft(Drafter):
    """DFlash, or DSpark where the spec has heads."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec)
        size = spec.hidden_size
        self.hidden_norm = RMSNorm(size, spec.rms_norm_eps)
        self.layers = Layers(DecoderLayer(spec, input_size=size) for _ in range(spec.num_layers))
        self.norm = RMSNorm(size, spec.rms_norm_eps)
        self.markov_head = (
            MarkovHead(spec.markov, vocab_size=spec.vocab_size, hidden_size=size)
            if spec.markov
            else None
        )
        self.confidence_head = ConfidenceHead(spec) if spec.confidence else None
        self.detach_confidence = spec.confidence is not None and spec.confidence.detach
        self.configure_loss(
            LossConfig()
            if spec.algorithm == "dspark"
            else LossConfig(ce=1.0, tv=0.0, confidence=0.0)
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        settings = self.loss_settings
        weights = {
            "ce": settings.ce,
            "tv": settings.tv,
            "confidence": settings.confidence if self.confidence_head else 0.0,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def configure_loss(self, settings: LossConfig) -> None:
        self.loss_settings = settings

    # Training

    def plan(self, batch: TrainBatch) -> BlockPlan:
        """Draw the anchors of each sample from its seed, and what their blocks predict."""
        drawn = sample_anchors(
            batch.loss_mask, batch.lengths, num_anchors=self.spec.num_anchors, seeds=batch.seeds
        )
        return self.plan_for(batch, drawn)

    def plan_for(self, batch: TrainBatch, anchors: Tensor) -> BlockPlan:
        """The plan for anchors that are already chosen: their places [K] in the packed row,
        ascending.
        """
        ids, mask, lengths = batch.input_ids, batch.loss_mask, batch.lengths
        plan = plan_blocks(
            ids,
            mask,
            lengths,
            anchors=anchors,
            block_size=self.block_size,
            decay=self.loss_settings.decay,
        )
        return filled(plan, FILL_BLOCKS) if self.execution.compile else plan

    def denominators(self, plan: BlockPlan) -> dict[str, Tensor]:
        return dict.fromkeys(self.loss_weights, plan.weights.sum())

    def loss(self, batch: TrainBatch, plan: BlockPlan) -> LossOutput:
        """Loss sums over the counted slots (eq. 9-12)."""
        if len(plan.anchors) == 0:
            return zero_loss(self, self.loss_weights)
        states, counted = self.block_states(batch.context, plan), plan.counted
        features = previous = None
        if self.markov_head is not None:
            embedded = self.markov_head.markov_w1(plan.previous)
            features, previous = (
                self.markov_head.features(states, embedded)[counted],
                embedded[counted],
            )
        slots = Slots(
            states=states[counted],
            features=features,
            confidence=self._confidence_logits(states[counted], previous),
            targets=Targets.gathered(batch.last_hidden, plan.places),
            labels=plan.labels[counted],
            weights=plan.weights[counted],
            counted=counted,
        )
        return block_loss(slots, self.vocabulary(), self.loss_settings)

    def _confidence_logits(self, states: Tensor, previous: Tensor | None) -> Tensor | None:
        if self.confidence_head is None:
            return None
        if self.detach_confidence:
            states, previous = states.detach(), previous.detach() if previous is not None else None
        return self.confidence_head(states, previous)

    def block_states(self, context: Tensor, plan: BlockPlan) -> Tensor:
        """Final-normed states [K, g, D] of the block behind each anchor; `context` [T, m * D]."""
        size, first, weight = self.block_size, plan.samples.starts, self.fc.weight
        table = self.rotations(len(context) + size)
        positions = (plan.anchors - first)[:, None] + torch.arange(size, device=first.device)
        rotations = table.at(plan.positions), table.at(positions.flatten())
        # the anchor's own state is not known yet
        visibility = BlockVisibility(
            first, plan.anchors, size, training_path(weight, self.spec.heads)
        )
        fused, x = (
            self._fuse(context[None]),
            self._embed_blocks(plan.anchor_tokens).flatten(0, 1)[None],
        )
        for layer in self.layers:
            x = self.execution.layer(
                layer.over_blocks, x, fused, rotations, visibility, self.execution
            )
        return self.norm(x)[0].unflatten(0, (-1, size))

    def _fuse(self, context: Tensor) -> Tensor:
        """Fused context RMSNorm(W_c h) [B, T, D] of the captured layers [B, T, m * D] (eq. 2)."""
        return self.hidden_norm(self.fc(context.to(self.fc.weight.dtype)))

    def _embed_blocks(self, anchor_tokens: Tensor) -> Tensor:
        """Inputs [..., g, D] of blocks: the anchor's embedding, then the mask token's."""
        ids = F.pad(
            anchor_tokens[..., None], (0, self.block_size - 1), value=self.spec.mask_token_id
        )
        return self.embed(ids)

    def vocabulary(self) -> Vocabulary:
        """The same, with the Markov head's W2."""
        shared = super().vocabulary()
        if self.markov_head is None:
            return shared
        return shared._replace(markov_w2=self.markov_head.markov_w2.weight)

    # Decoding

    @torch.no_grad()  # a graph through the cache would grow from round to round
    def extend(
        self, cache: DraftCache, context: Tensor, next_tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """Append the fused features of the first counts[b] positions of `context` [B, n, m * D]
        to row b.
        """
        longest = max(counts)
        if longest == 0:
            return
        fused, rotation = self._fuse(context[:, :longest]), cache.rotation(longest)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            keys, values = layer.self_attn.keys_values(fused, rotation)
            stored.write(keys, values, cache.lengths)
        cache.lengths = [
            length + count for length, count in zip(cache.lengths, counts, strict=True)
        ]

    @torch.no_grad()
    def propose(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """One backbone pass, then tokens left to right; `anchor` [B] long, `uniforms` [B, g]
        unless greedy.
        """
        rotation, mask, x = (
            cache.rotation(self.block_size),
            cache.mask(self.block_size),
            self._embed_blocks(anchor),
        )
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            # what it writes is overwritten by the next extend
            x = layer(x, rotation, stored, cache.lengths, mask)
        states = self.norm(x)
        logits = self.logits(states)
        drawn = None if uniforms is None or sampling.temperature == 0 else uniforms
        if self.markov_head is not None:
            tokens, probs, previous = sample_block(
                self.markov_head, states, logits, anchor=anchor, sampling=sampling, uniforms=drawn
            )
        else:  # no slot waits for another
            probs, previous = None if drawn is None else distribution(logits, sampling), None
            tokens = logits.argmax(-1) if probs is None or drawn is None else draw(probs, drawn)
        confidence = (
            self.confidence_head(states, previous).float().sigmoid()
            if self.confidence_head is not None
            else None
        )
        return Proposal(tokens, probs, confidence)
