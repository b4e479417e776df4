"""Eagle3 (arXiv 2503.01840): one decoder layer that goes on from its own outputs, token by token.

Position t (RoPE position t) reads the target's fused state g_t and token t + 1, and predicts token t + 2.
B batch, T tokens, S training-time-test steps, P scored positions of a sample, g block size, m captured layers, D hidden
size, V vocabulary, H heads, K key-value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.config import LossConfig, SamplingConfig
from deepspec.model.backbone import DecoderLayer, RMSNorm, RotaryTable, Rotation, embedding_scale, softcap
from deepspec.model.draft import DraftCache, Proposal, TrainBatch
from deepspec.model.kv import LayerCache
from deepspec.model.linear_loss import Vocabulary
from deepspec.model.loss import LossOutput, Scored, step_losses, zero_loss
from deepspec.model.sampling import distribution, draw
from deepspec.model.spec import DraftSpec


class Eagle3Plan(NamedTuple):
    positions: Tensor  # [B, P] long, ascending: the positions that some step is scored at (then fill, which no step counts)
    counted: Tensor  # [S, B, P] bool, which of them step s is scored at
    weights: Tensor  # [B] float32, one over each sample's length: the loss is a mean per sample, not per token


class Eagle3Layer(DecoderLayer):
    """A decoder layer whose attention reads token and state side by side (2 D wide)."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec, input_size=2 * spec.hidden_size)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def attention_input(self, embedded: Tensor, states: Tensor) -> Tensor:
        """[B, n, D] twice -> [B, n, 2 D]."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(states)], dim=-1)


class Eagle3Draft(nn.Module):
    """Satisfies `draft.Drafter`."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, size)
        self.lm_head = nn.Linear(size, spec.vocab_size, bias=False)
        self.fc = nn.Linear(spec.num_context_features, size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(spec)])
        self.norm = RMSNorm(size, spec.rms_norm_eps)
        self.rotary = RotaryTable(spec.rope, spec.heads.head_dim)
        for frozen in (self.embed_tokens, self.lm_head):
            frozen.weight.requires_grad = False

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def num_context_features(self) -> int:
        return self.spec.num_context_features

    @property
    def layer(self) -> Eagle3Layer:
        return cast("Eagle3Layer", self.layers[0])

    @property
    def loss_weights(self) -> dict[str, float]:
        return {f"ce@{step}": self.spec.step_loss_decay**step for step in range(self.spec.ttt_length)}

    def configure_loss(self, settings: LossConfig) -> None:
        """Nothing to set: Eagle3's loss has no terms of its own to weigh."""

    # Training

    def plan(self, batch: TrainBatch) -> Eagle3Plan:
        """Step s scores position t where t + s is supervised and not the sample's last token; no chance involved."""
        num_tokens = batch.input_ids.shape[1]
        before_last = torch.arange(num_tokens, device=batch.lengths.device) < batch.lengths[:, None] - 1
        supervised = batch.loss_mask & before_last
        steps = range(self.spec.ttt_length)
        counted = torch.stack([F.pad(supervised, (0, step))[:, step : step + num_tokens] for step in steps])  # [S, B, T]
        scored = counted.any(0)
        most = int(scored.sum(-1).max()) if len(scored) else 0
        positions = (~scored).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]
        return Eagle3Plan(positions, counted.gather(2, positions.expand(len(counted), -1, -1)), 1.0 / batch.lengths)

    def denominators(self, plan: Eagle3Plan) -> dict[str, Tensor]:
        return dict.fromkeys(self.loss_weights, plan.weights.new_tensor(len(plan.weights)))

    def loss(self, batch: TrainBatch, plan: Eagle3Plan) -> LossOutput:
        """Soft cross-entropy to the target's distribution at every step of the training-time test."""
        if plan.positions.shape[1] == 0:
            return zero_loss(self, self.loss_weights)
        rows = torch.arange(len(plan.positions), device=plan.positions.device)[:, None].expand_as(plan.positions)
        scored = []
        for step, states in enumerate(self.step_states(batch, plan)):
            counted = plan.counted[step]
            of_row, at = rows[counted], plan.positions[counted]
            # Step s at t is to match p_{t+1+s}; a counted position has t + s before the last token, so it is there.
            places = of_row * batch.last_hidden.shape[1] + at + 1 + step
            scored.append(Scored(self.norm(states[counted]), places, plan.weights[of_row], counted))
        vocabulary = Vocabulary(self.lm_head.weight, None, self.spec.logit_softcap)
        hidden = batch.last_hidden.flatten(0, 1)
        return step_losses(scored, vocabulary, hidden, self.loss_weights, plan.weights.new_tensor(len(plan.weights)))

    def step_states(self, batch: TrainBatch, plan: Eagle3Plan) -> Iterator[Tensor]:
        """The layer's raw output [B, P, D] at the plan's positions, step by step; each step reads the one before."""
        layer, num_tokens = self.layer, batch.input_ids.shape[1]
        table = self.rotary(num_tokens + self.spec.ttt_length, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        fused = self.fc(batch.context.to(self.fc.weight.dtype))
        x = layer.attention_input(self._embed(F.pad(batch.input_ids, (0, 1))[:, 1:]), fused)
        keys, values = layer.self_attn.keys_values(x, Rotation(table.cos[:num_tokens], table.sin[:num_tokens]))
        visible = torch.arange(num_tokens, device=x.device) <= plan.positions[:, :, None]  # [B, P, T]
        x, states = _take(x, plan.positions), _take(fused, plan.positions)
        own: list[tuple[Tensor, Tensor]] = []
        for step in range(self.spec.ttt_length):
            places = plan.positions + step
            rotation = Rotation(table.cos[places], table.sin[places])
            if step > 0:
                tokens = batch.input_ids.gather(1, (places + 1).clamp(max=num_tokens - 1))
                x = layer.attention_input(self._embed(tokens), states)
                own.append(layer.self_attn.keys_values(x, rotation))
            queries = layer.self_attn.queries(x, rotation)
            attended = attend_own(queries, (keys, values), own, visible=visible, scale=layer.self_attn.scale)
            states = layer.after_attention(states, layer.self_attn.o_proj(attended))
            yield states

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded = self.embed_tokens(tokens)
        return embedded * embedding_scale(self.spec.hidden_size, embedded.dtype) if self.spec.family.scaled_embeddings else embedded

    # Decoding

    def new_cache(self, rows: int, capacity: int) -> DraftCache:
        """Empty cache for rows of at most `capacity` verified tokens, in the draft's own dtype and device."""
        room = capacity + self.block_size
        weight = self.fc.weight
        cache = DraftCache([LayerCache(rows, room)], [0] * rows, self.rotary(room, device=weight.device, dtype=weight.dtype))
        cache.last_output = weight.new_zeros(rows, self.spec.hidden_size)
        return cache

    @torch.no_grad()  # a graph through the cache would grow from round to round
    def accept(self, cache: DraftCache, context: Tensor, next_tokens: Tensor, counts: Sequence[int]) -> None:
        """Append (features of a position, token after it) for the first counts[b] positions of row b."""
        longest = max(counts)
        if longest == 0:
            return
        fused = self.fc(context[:, :longest].to(self.fc.weight.dtype))
        x = self.layer.attention_input(self._embed(next_tokens[:, :longest]), fused)
        keys, values = self.layer.self_attn.keys_values(x, cache.rotation(longest))
        cache.layers[0].write(keys, values, cache.lengths)
        # Drafting goes on from the last position's output alone: the only query worth computing.
        lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        rows, last = range(len(counts)), [max(count - 1, 0) for count in counts]
        cache.lengths = [max(length - 1, 0) for length in lengths]
        output = self._continue(cache, x[rows, last][:, None], fused[rows, last][:, None])
        cache.lengths = lengths
        if min(counts) == 0 and cache.last_output is not None:
            output = torch.where(torch.tensor(counts, device=output.device)[:, None] > 0, output, cache.last_output)
        cache.last_output = output

    prefill = accept

    @torch.no_grad()
    def propose(self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None) -> Proposal:
        """Sample from the last output, feed output and token back, `block_size` times; the anchor is in the cache already."""
        lengths, states = cache.lengths, cast("Tensor", cache.last_output)
        drawn = None if sampling.temperature == 0 else uniforms
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for slot in range(self.block_size):
            if slot > 0:
                x = self.layer.attention_input(self._embed(tokens[-1][:, None]), states[:, None])
                keys, values = self.layer.self_attn.keys_values(x, cache.rotation(1))
                cache.layers[0].write(keys, values, cache.lengths)
                states = self._continue(cache, x, states[:, None])
                cache.lengths = [length + 1 for length in cache.lengths]
            logits = softcap(self.lm_head(self.norm(states)), self.spec.logit_softcap)
            if drawn is None:
                tokens.append(logits.argmax(-1))
            else:
                probs.append(distribution(logits, sampling))
                tokens.append(draw(probs[-1], drawn[:, slot]))
        cache.lengths = lengths  # what was fed here is overwritten by what the target verifies
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None, None)

    def _continue(self, cache: DraftCache, x: Tensor, residual: Tensor) -> Tensor:
        """Output [B, D] of the position at each row's length, already written; `x` [B, 1, 2 D], `residual` [B, 1, D]."""
        attention, stored = self.layer.self_attn, cache.layers[0]
        keys, values = stored.read(max(cache.lengths) + 1)
        attended = attention.attend(attention.queries(x, cache.rotation(1)), keys, values, cache.mask(1))
        return self.layer.after_attention(residual, attended)[:, 0]


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """`x` [B, T, D] at `positions` [B, P] -> [B, P, D]."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def attend_own(
    queries: Tensor, context: tuple[Tensor, Tensor], own: Sequence[tuple[Tensor, Tensor]], *, visible: Tensor, scale: float
) -> Tensor:
    """Attention of one training-time-test step: over step 0's keys, and the same position's keys of the later steps.

    Args:
        queries: [B, P, H, E].
        context: step 0's keys and values [B, K, T, E].
        own: keys and values of steps 1 to s at the same positions, [B, K, P, E] each.
        visible: [B, P, T] bool, which of step 0's keys a query sees.
        scale: factor on the scores.

    Returns:
        [B, P, H * E].
    """
    keys, values = context
    num_rows, num_positions, _, head_dim = queries.shape
    grouped = queries.view(num_rows, num_positions, keys.shape[1], -1, head_dim).permute(0, 2, 3, 1, 4) * scale  # [B, K, H/K, P, E]
    scores = torch.einsum("bkhpe,bkte->bkhpt", grouped, keys).masked_fill(~visible[:, None, None], -torch.inf)
    own_scores = [(grouped * own_keys[:, :, None]).sum(-1, keepdim=True) for own_keys, _ in own]
    weights = torch.cat([scores, *own_scores], -1).softmax(-1, dtype=torch.float32).to(values.dtype)
    attended = torch.einsum("bkhpt,bkte->bkhpe", weights[..., : keys.shape[2]], values)
    for step, (_, own_values) in enumerate(own, start=keys.shape[2]):
        attended = attended + weights[..., step : step + 1] * own_values[:, :, None]
    return attended.permute(0, 3, 1, 2, 4).flatten(2)
