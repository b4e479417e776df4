"""A draft of a target that is easy to foresee learns to foresee it completely."""

from __future__ import annotations

import pytest
import torch

from deepspec.config import LossConfig, SamplingConfig
from deepspec.model.checkpoint import build_draft
from deepspec.model.draft import TrainBatch
from deepspec.model.spec import DraftSpec
from tests.model.drafts import CONFIGS, LAYERS, QWEN3

VOCAB, SIZE, BLOCK, STEPS = 12, 24, 4, 100
FOLLOWING = torch.tensor([5, 3, 7, 11, 0, 9, 4, 1, 2, 10, 8, 6])  # token y always follows token x


def sequences(rows: int, num_tokens: int, frozen: torch.Tensor, seed: int) -> TrainBatch:
    """Samples of the copying target: z says which token follows, the context which one is there."""
    tokens = [torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(seed))]
    while len(tokens) < num_tokens:
        tokens.append(FOLLOWING[tokens[-1]])
    ids = torch.stack(tokens, 1)
    return TrainBatch(
        input_ids=ids,
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        lengths=torch.full((rows,), num_tokens),
        context=frozen[ids].repeat(1, 1, len(LAYERS)),
        last_hidden=3.0 * frozen[FOLLOWING[ids]],
        seeds=tuple(range(seed, seed + rows)),
    )


@pytest.mark.parametrize("name", ["dflash", "vanilla", "eagle3"])
def test_a_draft_of_a_copying_target_is_never_wrong(name: str) -> None:
    """Trap D2: were a label one off, what is learnt in training would be wrong in every slot of decoding."""
    config = CONFIGS[name].model_copy(update={"ttt_length": BLOCK} if name == "eagle3" else {})
    layer_ids = [0, 1, 2] if name == "eagle3" else LAYERS
    target = {**QWEN3, "vocab_size": VOCAB, "hidden_size": SIZE}
    spec = DraftSpec.from_target(target, config, layer_ids=layer_ids, mask_token_id=VOCAB - 1)
    frozen = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))[0][:VOCAB] * 2.0
    draft = build_draft(spec, embed=frozen, lm_head=frozen, seed=0)
    draft.configure_loss(LossConfig(ce=1.0, tv=0.0, confidence=0.0, decay=None))
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=1e-2)
    cooling = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.02, total_iters=STEPS)
    for step in range(STEPS):
        batch = sequences(16, 9 + BLOCK, frozen, seed=100 * step)
        output = draft.loss(batch, draft.plan(batch))
        optimizer.zero_grad()
        (output.numerator / output.denominator).backward()
        optimizer.step()
        cooling.step()

    fresh = sequences(VOCAB, 9 + BLOCK, frozen, seed=7)
    with torch.inference_mode():
        cache = draft.new_cache(VOCAB, 16)
        draft.prefill(cache, fresh.context[:, :8], fresh.input_ids[:, 1:9], [8] * VOCAB)
        proposal = draft.propose(cache, fresh.input_ids[:, 8], SamplingConfig(temperature=0), None)
    assert torch.equal(proposal.tokens, fresh.input_ids[:, 9 : 9 + BLOCK])
