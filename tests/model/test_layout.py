"""The layout of released DFlash drafts, computed once more one block and one query at a time.

A block's inputs are the anchor at position a, which predicts nothing, and mask tokens at a + 1 to
a + N, each of which predicts the token in its own place.
"""

import math

import pytest
import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import LossConfig
from deepspec.model.anchors import sample_anchors
from deepspec.model.block_draft import BlockDraft
from deepspec.model.drafter import TrainBatch
from tests.model.drafts import CONFIGS, CONTEXT, VOCAB, make_batch, make_draft, taken, total_loss

N, MASK = CONTEXT.block_size, VOCAB - 1


def context_draft(name: str = "context", *, target: str = "qwen3") -> BlockDraft:
    draft = make_draft(CONFIGS[name], target=target)
    assert isinstance(draft, BlockDraft)
    return draft


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector [E] at a position."""
    half = len(x) // 2
    angles = [position * theta ** (-2 * pair / len(x)) for pair in range(half)]
    cos, sin = (torch.tensor([of(angle) for angle in angles]) for of in (math.cos, math.sin))
    first, second = x[:half], x[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def plain_logits(draft: BlockDraft, context: Tensor, anchor: int, token: int) -> Tensor:
    """Logits [N, V] of one block of a draft for Qwen3, from its tensors alone.

    `context` [T, m * D] is that of one sample.
    """
    w, spec = draft.state_dict(), draft.spec
    eps, theta, heads = spec.rms_norm_eps, spec.rope.theta, spec.heads
    fused = normed(context[:anchor] @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    x = w["embed_tokens.weight"][[token] + [MASK] * N]
    places = list(range(anchor, anchor + 1 + N))
    for layer in range(spec.num_layers):
        of = {
            key.removeprefix(f"layers.{layer}."): value
            for key, value in w.items()
            if key.startswith(f"layers.{layer}.")
        }
        inputs = normed(x, of["input_layernorm.weight"], eps)
        seen = torch.cat([fused, inputs])
        attended = []
        for query, place in zip(inputs, places, strict=True):
            outputs = []
            for head in range(heads.num_heads):
                group = head // (heads.num_heads // heads.num_kv_heads)

                def part(
                    kind: str, number: int, states: Tensor, of: dict[str, Tensor] = of
                ) -> Tensor:
                    rows = slice(number * heads.head_dim, (number + 1) * heads.head_dim)
                    return states @ of[f"self_attn.{kind}_proj.weight"][rows].T

                q = normed(part("q", head, query), of["self_attn.q_norm.weight"], eps)
                keys = normed(part("k", group, seen), of["self_attn.k_norm.weight"], eps)
                at = [*range(anchor), *places]
                scores = torch.stack(
                    [
                        turned(q, place, theta) @ turned(k, p, theta)
                        for k, p in zip(keys, at, strict=True)
                    ]
                )
                weights = (scores / math.sqrt(heads.head_dim)).softmax(0)
                outputs.append(weights @ part("v", group, seen))
            attended.append(torch.cat(outputs) @ of["self_attn.o_proj.weight"].T)
        x = x + torch.stack(attended)
        inner = normed(x, of["post_attention_layernorm.weight"], eps)
        gate, up = (inner @ of[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ of["mlp.down_proj.weight"].T
    return normed(x[1:], w["norm.weight"], eps) @ w["lm_head.weight"].T


def plain_loss(draft: BlockDraft, batch: TrainBatch, decay: float) -> float:
    """The mean cross-entropy over a batch, block by block and slot by slot."""
    total = weight = 0.0
    for sample in range(len(batch.lengths)):
        single = taken(batch, sample)
        ids, mask = single.input_ids.tolist(), single.loss_mask.tolist()
        for anchor in sample_anchors(single, draft.spec.num_anchors).tolist():
            logits = plain_logits(draft, single.context, anchor, ids[anchor])
            for slot in range(1, N + 1):
                place = anchor + slot
                if place >= len(ids) or not mask[place]:
                    break
                of_slot = math.exp(-(slot - 1) / decay)
                total -= of_slot * float(logits[slot - 1].log_softmax(-1)[ids[place]])
                weight += of_slot
    return total / weight


@torch.no_grad()
def test_the_loss_is_that_of_blocks_computed_one_query_at_a_time() -> None:
    draft, batch = context_draft(), make_batch((14, 9, 11))
    draft.configure_loss(LossConfig(ce=1.0, tv=0.0, confidence=0.0, decay=3.0))
    assert float(total_loss(draft, batch)) == pytest.approx(plain_loss(draft, batch, 3.0), rel=1e-5)


@torch.no_grad()
def test_what_is_drafted_is_what_the_mask_tokens_predict_in_their_own_places() -> None:
    draft, batch = context_draft(), make_batch((12,))
    cache = draft.new_cache(1, 9)
    draft.extend(cache, batch.context[None, :9], batch.input_ids[None, 1:10], [9])
    proposal = draft.propose(
        cache, batch.input_ids[None, 9], SamplingConfig(temperature=1.0), torch.full((1, N), 0.5)
    )
    assert proposal.probs is not None
    wanted = plain_logits(draft, batch.context, 9, int(batch.input_ids[9])).softmax(-1)
    torch.testing.assert_close(proposal.probs[0], wanted, rtol=1e-4, atol=1e-6)
    assert proposal.tokens.shape == (1, N)


@pytest.mark.parametrize("target", ["qwen3", "gemma4"])
@torch.no_grad()
def test_a_block_has_one_input_more_than_it_predicts(target: str) -> None:
    """Labels and slots that count are those of the other layout; inputs are not."""
    context, other = context_draft(target=target), make_draft(CONFIGS["dflash"], target=target)
    assert isinstance(other, BlockDraft)
    batch, anchors = make_batch((14, 9)), torch.tensor([7, 9, 19])
    plan, of_other = context.plan_for(batch, anchors), other.plan_for(batch, anchors)
    for name in ("labels", "counted", "weights", "slots"):
        assert torch.equal(getattr(plan, name), getattr(of_other, name)), name
    assert torch.equal(plan.previous, of_other.previous)
    assert (plan.visibility.block_size, of_other.visibility.block_size) == (N + 1, N)
    assert context.block_states(batch.context, plan).shape == (3, N, context.spec.hidden_size)


@pytest.mark.parametrize("name", ["context", "context_rnn"])
@torch.no_grad()
def test_a_block_sees_its_anchor_and_what_comes_before_it(name: str) -> None:
    """Trap D1, in this layout."""
    draft, batch = context_draft(name), make_batch((14,))
    plan = draft.plan_for(batch, torch.tensor([4, 8]))
    states = draft.block_states(batch.context, plan)
    for position, moved in ((3, [True, True]), (4, [False, True]), (8, [False, False])):
        context = batch.context.clone()
        context[position] += 1.0
        changed = draft.block_states(context, plan)
        assert [not torch.equal(changed[block], states[block]) for block in (0, 1)] == moved
    for position, moved in ((4, [True, False]), (5, [False, False]), (8, [False, True])):
        ids = batch.input_ids.clone()
        ids[position] = (ids[position] + 1) % MASK
        moved_plan = draft.plan_for(batch._replace(input_ids=ids), torch.tensor([4, 8]))
        changed = draft.block_states(batch.context, moved_plan)
        assert [not torch.equal(changed[block], states[block]) for block in (0, 1)] == moved


def test_a_step_computes_the_anchor_as_well() -> None:
    assert CONTEXT.num_slots(2) == 2 * (N + 1)
    assert CONTEXT.num_slots(100) == CONTEXT.num_anchors * (N + 1)
    assert CONFIGS["dflash"].num_slots(2) == 2 * N
