"""Markov heads by hand: what each kind computes, and that drafting steps as training teaches."""

import pytest
import torch

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import BlockDraftConfig, MarkovConfig
from deepspec.model.heads import MarkovHead, sample_block
from deepspec.model.spec import DraftSpec
from tests.model.drafts import QWEN3

V, D, R, G = 11, 5, 3, 4


def make_head(kind: str) -> MarkovHead:
    torch.manual_seed(3)
    config = MarkovConfig(rank=R, kind=kind)
    draft = BlockDraftConfig(algorithm="dspark", markov=config)
    target = QWEN3 | {"vocab_size": V, "hidden_size": D}
    spec = DraftSpec.from_target(target, draft, layer_ids=[0], mask_token_id=0)
    return MarkovHead(spec, config)


def test_the_rnn_head_carries_its_state_through_the_block() -> None:
    """Eq. 6 written out: gate, candidate and output from [s; W1 y; n], s from 0 in each block."""
    head = make_head("rnn")
    states, previous = torch.randn(2, G, D), torch.randn(2, G, R)
    weight, bias = head.joint_proj.weight, head.joint_proj.bias
    for block in range(2):
        s = torch.zeros(R)
        for slot in range(G):
            z = weight @ torch.cat([s, previous[block, slot], states[block, slot]]) + bias
            gate, candidate, output = (
                torch.sigmoid(z[:R]),
                torch.tanh(z[R : 2 * R]),
                torch.tanh(z[2 * R :]),
            )
            s = gate * s + (1 - gate) * candidate
            torch.testing.assert_close(head.features(states, previous)[block, slot], output)


def test_the_gated_head_weighs_the_embedding_by_state_and_token() -> None:
    head = make_head("gated")
    states, previous = torch.randn(2, G, D), torch.randn(2, G, R)
    gate = torch.sigmoid(head.gate_proj(torch.cat([states, previous], -1)))
    torch.testing.assert_close(head.features(states, previous), gate * previous)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_sampling_a_block_uses_the_biases_that_teacher_forcing_gives(kind: str) -> None:
    head = make_head(kind)
    states, base, anchor = torch.randn(2, G, D), torch.randn(2, G, V), torch.tensor([4, 7])
    sampling = SamplingConfig(temperature=1)
    for uniforms in (None, torch.rand(2, G, dtype=torch.float64)):
        drawn = sample_block(
            head, states, base, anchor=anchor, sampling=sampling, uniforms=uniforms
        )
        previous = head.markov_w1(torch.cat([anchor[:, None], drawn.tokens[:, :-1]], 1))
        logits = base + head.markov_w2(head.features(states, previous))
        if drawn.probs is None:
            assert torch.equal(drawn.tokens, logits.argmax(-1))
        else:
            torch.testing.assert_close(drawn.probs, logits.softmax(-1))
