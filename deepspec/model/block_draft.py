"""Block drafters: DFlash is the backbone alone, DSpark adds a Markov and a confidence head.

B batch, T tokens, K anchors, g block size, q inputs of a block, D hidden size, m captured layers, V
vocabulary, r Markov rank, E head dimension. The slots, which predict, are a block's last g inputs:
all of them, or all but the anchor.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import LossConfig
from deepspec.model.anchors import BlockPlan, plan_blocks, sample_anchors
from deepspec.model.attention_path import training_path
from deepspec.model.drafter import DraftCache, Drafter, Proposal, TrainBatch
from deepspec.model.execution import FILL_BLOCKS
from deepspec.model.heads import ConfidenceHead, MarkovHead, sample_block
from deepspec.model.host_copy import send_all
from deepspec.model.layers import DecoderLayer, Layers, RMSNorm
from deepspec.model.loss import LossOutput, Slots, block_loss, zero_loss
from deepspec.model.sampling import choose_tokens
from deepspec.model.spec import DraftSpec
from deepspec.model.targets import Targets


class BlockDraft(Drafter):
    """DFlash, or DSpark where the spec has heads."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec)
        size = spec.hidden_size
        self.hidden_norm = RMSNorm(size, spec.rms_norm_eps)
        self.layers = Layers(DecoderLayer(spec, input_size=size) for _ in range(spec.num_layers))
        self.norm = RMSNorm(size, spec.rms_norm_eps)
        self.markov_head = MarkovHead(spec, spec.markov) if spec.markov else None
        self.confidence_head = ConfidenceHead(spec, spec.confidence) if spec.confidence else None
        self.loss_settings = LossConfig()
        if spec.algorithm == "dflash":
            self.loss_settings = LossConfig(ce=1.0, tv=0.0, confidence=0.0)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each term that the loss has."""
        settings = self.loss_settings
        weights = {"ce": settings.ce, "tv": settings.tv}
        if self.confidence_head is not None:
            weights["confidence"] = settings.confidence
        return {name: weight for name, weight in weights.items() if weight > 0}

    def configure_loss(self, settings: LossConfig) -> None:
        """Set the weights of the terms, and how fast slots count less along a block."""
        self.loss_settings = settings

    # Training

    def plan(self, batch: TrainBatch) -> BlockPlan:
        """Draw the anchors of each sample from its seed, and what their blocks predict."""
        return self.plan_for(batch, sample_anchors(batch, self.spec.num_anchors))

    def plan_for(self, batch: TrainBatch, anchors: Tensor) -> BlockPlan:
        """The plan for chosen anchors: their places [K] in the packed row, ascending."""
        plan = plan_blocks(
            batch,
            anchors,
            block_size=self.block_size,
            decay=self.loss_settings.decay,
            num_queries=self.num_queries,
            multiple=FILL_BLOCKS if self.execution.compile else 1,
        )
        num_tokens, device = len(batch.context), batch.context.device
        plan.visibility.prepare(num_tokens=num_tokens, copies=[1], device=device)
        return send_all(plan, device)

    def loss(self, batch: TrainBatch, plan: BlockPlan) -> LossOutput:
        """Loss sums over the counted slots (eq. 9-12)."""
        if len(plan.anchors) == 0:
            return zero_loss(self, self.loss_weights)

        def counted(of_slots: Tensor) -> Tensor:
            """Those [N, ...] of [K, g, ...] that count; their number is known on the host."""
            return of_slots.flatten(0, 1)[plan.slots]

        of_blocks = self.block_states(batch.context, plan)
        states = counted(of_blocks)
        features = previous = confidence = w2 = None
        if self.markov_head is not None:
            w2 = self.markov_head.markov_w2.weight
            embedded = self.markov_head.markov_w1(plan.previous)
            features = counted(self.markov_head.features(of_blocks, embedded))
            previous = counted(embedded)
        if self.confidence_head is not None:
            confidence = self.confidence_head(states, previous)
        slots = Slots(
            states=states,
            features=features,
            confidence=confidence,
            targets=Targets.gathered(batch.last_hidden, plan.targets),
            labels=counted(plan.labels),
            weights=counted(plan.weights),
            numbers=plan.slots,
            shape=(len(plan.anchors), self.block_size),
        )
        return block_loss(slots, self.vocabulary(w2), self.loss_weights)

    def block_states(self, context: Tensor, plan: BlockPlan) -> Tensor:
        """Final-normed states [K, g, D] of each anchor's block; `context` [T, m * D]."""
        size, first = self.num_queries, plan.samples.starts
        table = self.rotary(len(context) + size, like=self.fc.weight)
        positions = (plan.anchors - first)[:, None] + torch.arange(size, device=first.device)
        rotations = table.at(plan.positions), table.at(positions.flatten())
        path = training_path(self.fc.weight, self.spec, block_size=size)
        visibility = plan.visibility.along(path)
        fused = self._fuse(context[None])
        x = self._embed_blocks(plan.anchor_tokens).flatten(0, 1)[None]
        run = self.execution
        for layer in self.layers:
            x = run.layer(layer.over_blocks, x, fused, rotations, visibility, run)
        return self.norm(self._slots(x[0].unflatten(0, (-1, size))))

    def _fuse(self, context: Tensor) -> Tensor:
        """Fused context RMSNorm(W_c h) [B, T, D] of the captured layers [B, T, m * D] (eq. 2)."""
        return self.hidden_norm(self.fc(context.to(self.fc.weight.dtype)))

    def _embed_blocks(self, anchor_tokens: Tensor) -> Tensor:
        """Inputs [..., q, D] of blocks: the anchor's embedding, then the mask token's."""
        masks = (0, self.num_queries - 1)
        return self.embed(F.pad(anchor_tokens[..., None], masks, value=self.spec.mask_token_id))

    def _slots(self, of_blocks: Tensor) -> Tensor:
        """What of a block's inputs [..., q, D] predicts, [..., g, D]."""
        return of_blocks[..., self.num_queries - self.block_size :, :]

    # Decoding

    def _append(
        self,
        cache: DraftCache,
        context: Tensor,
        next_tokens: Tensor,
        added: Tensor,
        counts: Sequence[int],
    ) -> None:
        """The fused features of the positions."""
        fused, rotation = self._fuse(context), cache.rotation(context.shape[1])
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            cache.write(stored, *layer.self_attn.keys_values(fused, rotation))

    def _draft(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """One backbone pass, then tokens left to right."""
        rotation, mask = cache.rotation(self.num_queries), cache.mask(self.num_queries)
        x = self._embed_blocks(anchor)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            # what it writes is overwritten by the next extend
            x = layer(x, rotation, partial(cache.write, stored), mask)
        states = self.norm(self._slots(x))
        logits = self.logits(states)
        previous = confidence = None
        if self.markov_head is None:  # no slot waits for another
            tokens, probs = choose_tokens(logits, sampling, uniforms)
        else:
            tokens, probs = sample_block(
                self.markov_head,
                states,
                logits,
                anchor=anchor,
                sampling=sampling,
                uniforms=uniforms,
            )
            before = torch.cat([anchor[:, None], tokens[:, :-1]], 1)
            previous = self.markov_head.markov_w1(before)
        if self.confidence_head is not None:
            confidence = self.confidence_head(states, previous).float().sigmoid()
        return Proposal(tokens, probs, confidence)
