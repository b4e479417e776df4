"""Eagle3 (arXiv 2503.01840): one decoder layer that goes on from its own outputs, token by token.

Position t (RoPE position t) reads the target's fused state g_t and token t + 1, and predicts token
t + 2. B batch, n new positions, T tokens, P scored places, g block size, m captured layers, D
hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.anchors import Eagle3Plan, plan_steps
from deepspec.model.attention import BlockVisibility, KeysValues, attend
from deepspec.model.attention_path import training_path
from deepspec.model.chunked_loss import Coefficients, score
from deepspec.model.drafter import DraftCache, Drafter, Proposal, TrainBatch
from deepspec.model.execution import FILL_TOKENS
from deepspec.model.host_copy import send, send_all
from deepspec.model.layers import Attention, DecoderLayer, Layers, RMSNorm, Rotation
from deepspec.model.loss import LossOutput, Metrics, zero_loss
from deepspec.model.sampling import DrawnTokens, choose_tokens, stacked
from deepspec.model.spec import DraftSpec
from deepspec.model.targets import Targets


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
        """The only layer."""
        return cast("Eagle3Layer", self.layers[0])

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each step's soft cross-entropy, by `ce@STEP`."""
        decay = self.spec.step_loss_decay
        return {f"ce@{step}": decay**step for step in range(self.spec.ttt_length)}

    # Training

    def plan(self, batch: TrainBatch) -> Eagle3Plan:
        """Where each step of the training-time test is scored; no chance involved."""
        multiple = FILL_TOKENS if self.execution.compile else 1
        steps, device = self.spec.ttt_length, batch.context.device
        plan = plan_steps(batch, num_steps=steps, multiple=multiple)
        copies = range(steps)  # of the slots, one more at each step
        plan.visibility.prepare(num_tokens=len(batch.context), copies=copies, device=device)
        return send_all(plan, device)

    def loss(self, batch: TrainBatch, plan: Eagle3Plan) -> LossOutput:
        """Soft cross-entropy to the target's distribution at every step, and acceptance rates.

        Steps are compared with the same positions of the target, each one shifted by one more, so
        they are scored together.
        """
        weights = self.loss_weights
        if len(plan.places) == 0:
            return zero_loss(self, weights)
        scored = plan.columns.split(plan.num_scored)
        by_step = zip(self.step_states(batch.context, plan), scored, strict=True)
        normed = torch.cat([self.norm(states[columns]) for states, columns in by_step])
        by_place = plan.weights[plan.columns]
        factors = send([*weights.values()], by_place.device)[plan.steps]
        scores = score(
            normed,
            None,
            self.vocabulary(),
            Targets.gathered(batch.last_hidden, plan.targets),
            labels=None,
            coefficients=Coefficients(soft_ce=factors * by_place),
        )
        table = by_place.new_zeros(3, *plan.counted.shape)
        measured = by_place * scores.soft_ce, 1.0 - 0.5 * scores.tv, scores.hits
        table[:, plan.steps, plan.columns] = torch.stack(measured)
        counts, rates = plan.counted.sum(1).float(), table[1]
        numerators: dict[str, Tensor] = {}
        metrics: Metrics = {}
        for step, (name, sums) in enumerate(zip(weights, table.sum(2).T, strict=True)):
            numerators[name] = sums[0]
            metrics[name] = (sums[0], plan.num_samples)
            metrics[f"accept@{step}"] = (sums[1], counts[step])
            metrics[f"accuracy@{step}"] = (sums[2], counts[step])
        starts = plan.counted[0]
        metrics["tau"] = (((starts + rates.cumprod(0).sum(0)) * starts).sum(), counts[0])
        return LossOutput(scores.total, plan.num_samples, numerators, metrics)

    def step_states(self, context: Tensor, plan: Eagle3Plan) -> Iterator[Tensor]:
        """The layer's raw output [P, D] at the plan's places, step by step; `context` [T, m * D].

        Each step reads the output of the one before in place of the fused states.
        """
        run, layer, weight = self.execution.positionwise, self.layer, self.fc.weight
        table = self.rotary(len(context) + self.spec.ttt_length, like=weight)
        fused = self.fc(context[None].to(weight.dtype))
        embedded = self.embed(plan.next_tokens)[None]
        x = run(Eagle3Layer.attention_input, layer, embedded, fused)
        of_tokens = run(Attention.keys_values, layer.self_attn, x, table.at(plan.positions))
        path = training_path(weight, self.spec, block_size=1)
        visibility = plan.visibility.along(path)
        own: list[KeysValues] = []
        x, states = x[:, plan.places], fused[:, plan.places]
        for step in range(self.spec.ttt_length):
            rotation = table.at(plan.places - plan.starts + step)
            if step > 0:
                newest = self.embed(plan.tokens[step])[None]
                x = run(Eagle3Layer.attention_input, layer, newest, states)
                own.append(run(Attention.keys_values, layer.self_attn, x, rotation))
            states = self.execution.layer(
                self._step, x, states, of_tokens, tuple(own), rotation, visibility
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
        """The layer's output [1, P, D]; attention reads `x` [1, P, 2 D], `states` is residual."""
        run, attention = self.execution.positionwise, self.layer.self_attn
        queries = run(Attention.queries, attention, x, rotation)
        attended = attend(queries, context, own, visibility, scale=attention.scale)
        return run(Eagle3Layer.after_attention, self.layer, states, attention.o_proj(attended))

    # Decoding

    def _append(
        self,
        cache: DraftCache,
        context: Tensor,
        next_tokens: Tensor,
        added: Tensor,
        counts: Sequence[int],
    ) -> None:
        """Features of a position, and the token after it."""
        fused = self.fc(context.to(self.fc.weight.dtype))
        x = self._write(cache, next_tokens, fused)
        # Drafting goes on from the last position's output alone: the only query worth computing.
        rows = torch.arange(len(counts), device=x.device)
        last = (added - 1).clamp(min=0)
        with cache.moved([count - 1 for count in counts], added[:, None] - 1):
            output = self._output(cache, x[rows, last][:, None], fused[rows, last][:, None])
        cache.last_output.copy_(torch.where(added[:, None] > 0, output, cache.last_output))

    def _draft(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """Sample from the last output, feed output and token back, `block_size` times.

        The anchor is in the cache already.
        """
        states, num_rows = cache.last_output, len(anchor)
        drawn: list[DrawnTokens] = []
        for slot in range(self.block_size):
            if slot > 0:
                # what is fed here is overwritten by what the target verifies
                with cache.moved([slot - 1] * num_rows, slot - 1):
                    x = self._write(cache, drawn[-1].tokens[:, None], states[:, None])
                    states = self._output(cache, x, states[:, None])
            logits = self.logits(self.norm(states))
            numbers = None if uniforms is None else uniforms[:, slot]
            drawn.append(choose_tokens(logits, sampling, numbers))
        tokens, probs = stacked(drawn)
        return Proposal(tokens, probs, None)

    def _write(self, cache: DraftCache, tokens: Tensor, states: Tensor) -> Tensor:
        """Put tokens [B, n] and states [B, n, D] into the cache; what attention reads of them."""
        x = self.layer.attention_input(self.embed(tokens), states)
        keys_values = self.layer.self_attn.keys_values(x, cache.rotation(x.shape[1]))
        cache.write(cache.layers[0], *keys_values)
        return x

    def _output(self, cache: DraftCache, x: Tensor, residual: Tensor) -> Tensor:
        """Output [B, D] at each row's length, already written; `x` [B, 1, 2 D]."""
        attention = self.layer.self_attn
        keys, values = cache.layers[0].read(cache.end(1))
        queries = attention.queries(x, cache.rotation(1))
        attended = attention.attend(queries, keys, values, cache.mask(1))
        return self.layer.after_attention(residual, attended)[:, 0]
