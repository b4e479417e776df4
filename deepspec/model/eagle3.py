"""Eagle3 (arXiv 2503.01840): one decoder layer that goes on from its own outputs, token by token.

Position t (RoPE position t) reads the target's fused state g_t and token t + 1, and predicts token
t + 2. B batch, T tokens, S training-time-test steps, P scored places, g block size, m captured
layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.anchors import Samples
from deepspec.model.attention import BlockVisibility, KeysValues, attend
from deepspec.model.attention_path import training_path
from deepspec.model.drafter import DraftCache, Drafter, Proposal, TrainBatch
from deepspec.model.execution import FILL_TOKENS
from deepspec.model.layers import Attention, DecoderLayer, Layers, RMSNorm, Rotation
from deepspec.model.loss import LossOutput, StepStates, step_losses, zero_loss
from deepspec.model.sampling import distribution, draw
from deepspec.model.spec import DraftSpec


class Eagle3Plan(NamedTuple):
    # [P] long, where in the packed row some step is scored at, ascending (then fill, which no step
    # counts)
    places: Tensor
    starts: Tensor  # [P] long, where the sample of each begins
    positions: Tensor  # [T] long, of every token within its own sample
    counted: Tensor  # [S, P] bool, which of the places step s is scored at
    # [P] float32, one over the length of its sample: the loss is a mean per sample, not per token
    weights: Tensor
    num_samples: Tensor  # float32


class Eagle3Layer(DecoderLayer):
    """A decoder layer whose attention reads token and state side by side (2 D wide)."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec, input_size=2 * spec.hidden_size)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def attention_input(self, embedded: Tensor, states: Tensor) -> Tensor:
        """[B, n, D] twice -> [B, n, 2 D]."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(states)], dim=-1)


class Eagle3Draft(Drafter):
    """One Eagle3 layer between the fused states and the target's lm_head."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__(spec)
        self.layers = Layers([Eagle3Layer(spec)])
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    @property
    def layer(self) -> Eagle3Layer:
        return cast("Eagle3Layer", self.layers[0])

    @property
    def loss_weights(self) -> dict[str, float]:
        return {
            f"ce@{step}": self.spec.step_loss_decay**step for step in range(self.spec.ttt_length)
        }

    # Training

    def plan(self, batch: TrainBatch) -> Eagle3Plan:
        """Step s scores position t where t + s is supervised and not the sample's last token;
        no chance involved.
        """
        num_tokens = len(batch.input_ids)
        places = torch.arange(num_tokens, device=batch.lengths.device)
        samples = Samples.of(batch.lengths).holding(places)
        ahead = places + torch.arange(self.spec.ttt_length, device=places.device)[:, None]  # [S, T]
        counted = batch.loss_mask[ahead.clamp(max=num_tokens - 1)] & (ahead < samples.ends - 1)
        scored = counted.any(0).nonzero()[:, 0]
        fill = (0, -len(scored) % FILL_TOKENS if self.execution.compile else 0)
        starts, weights = (
            F.pad(samples.starts[scored], fill),
            F.pad(1.0 / (samples.ends - samples.starts)[scored], fill),
        )
        num_samples = weights.new_tensor(len(batch.lengths))
        return Eagle3Plan(
            F.pad(scored, fill),
            starts,
            places - samples.starts,
            F.pad(counted[:, scored], fill),
            weights,
            num_samples,
        )

    def denominators(self, plan: Eagle3Plan) -> dict[str, Tensor]:
        return dict.fromkeys(self.loss_weights, plan.num_samples)

    def loss(self, batch: TrainBatch, plan: Eagle3Plan) -> LossOutput:
        """Soft cross-entropy to the target's distribution at every step of the training-time
        test.
        """
        if len(plan.places) == 0:
            return zero_loss(self, self.loss_weights)
        scored = []
        for step, (states, counted) in enumerate(
            zip(self.step_states(batch, plan), plan.counted, strict=True)
        ):
            # Step s at t is to match p_{t+1+s}; a counted position has t + s before the last token,
            # so it is there.
            scored.append(
                StepStates(
                    self.norm(states[counted]),
                    plan.places[counted] + 1 + step,
                    plan.weights[counted],
                    counted,
                )
            )
        return step_losses(
            scored, self.vocabulary(), batch.last_hidden, self.loss_weights, plan.num_samples
        )

    def step_states(self, batch: TrainBatch, plan: Eagle3Plan) -> Iterator[Tensor]:
        """The layer's raw output [P, D] at the plan's places, step by step; each step reads the
        one before.
        """
        run, attention, num_tokens = (
            self.execution.positionwise,
            self.layer.self_attn,
            len(batch.input_ids),
        )
        table = self.rotations(num_tokens + self.spec.ttt_length)
        fused = self.fc(batch.context[None].to(self.fc.weight.dtype))
        x = run(
            Eagle3Layer.attention_input,
            self.layer,
            self.embed(batch.input_ids.roll(-1))[None],
            fused,
        )
        context = run(Attention.keys_values, attention, x, table.at(plan.positions))
        visibility = BlockVisibility(
            plan.starts, plan.places + 1, 1, training_path(self.fc.weight, self.spec.heads)
        )
        own: list[KeysValues] = []
        x, states = x[:, plan.places], fused[:, plan.places]
        for step in range(self.spec.ttt_length):
            rotation = table.at(plan.places - plan.starts + step)
            if step > 0:
                tokens = batch.input_ids[(plan.places + 1 + step).clamp(max=num_tokens - 1)]
                x = run(Eagle3Layer.attention_input, self.layer, self.embed(tokens)[None], states)
                own.append(run(Attention.keys_values, attention, x, rotation))
            states = self.execution.layer(
                self._step, x, states, context, tuple(own), rotation, visibility
            )
            yield states[0]

    def _step(
        self,
        x: Tensor,
        states: Tensor,
        context: KeysValues,
        own: Sequence[KeysValues],
        rotation: Rotation,
        visibility: BlockVisibility,
    ) -> Tensor:
        """The layer's output [1, P, D]: attention reads `x` [1, P, 2 D], the residual stream is
        `states`.
        """
        run, attention = self.execution.positionwise, self.layer.self_attn
        attended = attend(
            run(Attention.queries, attention, x, rotation),
            context,
            own,
            visibility,
            scale=attention.scale,
        )
        return run(Eagle3Layer.after_attention, self.layer, states, attention.o_proj(attended))

    # Decoding

    def new_cache(self, rows: int, capacity: int) -> DraftCache:
        """The same, with room for the output that drafting goes on from."""
        cache = super().new_cache(rows, capacity)
        cache.last_output = self.fc.weight.new_zeros(rows, self.spec.hidden_size)
        return cache

    @torch.no_grad()  # a graph through the cache would grow from round to round
    def extend(
        self, cache: DraftCache, context: Tensor, next_tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """Append (features of a position, token after it) for the first counts[b] positions of
        row b.
        """
        longest = max(counts)
        if longest == 0:
            return
        fused = self.fc(context[:, :longest].to(self.fc.weight.dtype))
        x = self.layer.attention_input(self.embed(next_tokens[:, :longest]), fused)
        keys, values = self.layer.self_attn.keys_values(x, cache.rotation(longest))
        cache.layers[0].write(keys, values, cache.lengths)
        # Drafting goes on from the last position's output alone: the only query worth computing.
        lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        rows, last = range(len(counts)), [max(count - 1, 0) for count in counts]
        cache.lengths = [max(length - 1, 0) for length in lengths]
        output = self._continue(cache, x[rows, last][:, None], fused[rows, last][:, None])
        cache.lengths = lengths
        if min(counts) == 0 and cache.last_output is not None:
            output = torch.where(
                torch.tensor(counts, device=output.device)[:, None] > 0, output, cache.last_output
            )
        cache.last_output = output

    @torch.no_grad()
    def propose(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """Sample from the last output, feed output and token back, `block_size` times; the
        anchor is in the cache already.
        """
        lengths, states = cache.lengths, cast("Tensor", cache.last_output)
        drawn = None if sampling.temperature == 0 else uniforms
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for slot in range(self.block_size):
            if slot > 0:
                x = self.layer.attention_input(self.embed(tokens[-1][:, None]), states[:, None])
                keys, values = self.layer.self_attn.keys_values(x, cache.rotation(1))
                cache.layers[0].write(keys, values, cache.lengths)
                states = self._continue(cache, x, states[:, None])
                cache.lengths = [length + 1 for length in cache.lengths]
            logits = self.logits(self.norm(states))
            if drawn is None:
                tokens.append(logits.argmax(-1))
            else:
                probs.append(distribution(logits, sampling))
                tokens.append(draw(probs[-1], drawn[:, slot]))
        cache.lengths = lengths  # what was fed here is overwritten by what the target verifies
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None, None)

    def _continue(self, cache: DraftCache, x: Tensor, residual: Tensor) -> Tensor:
        """Output [B, D] of the position at each row's length, already written; `x` [B, 1, 2 D],
        `residual` [B, 1, D].
        """
        attention, stored = self.layer.self_attn, cache.layers[0]
        keys, values = stored.read(max(cache.lengths) + 1)
        attended = attention.attend(
            attention.queries(x, cache.rotation(1)), keys, values, cache.mask(1)
        )
        return self.layer.after_attention(residual, attended)[:, 0]
