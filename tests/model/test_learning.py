"""A draft of a target that copies its input learns to foresee it, at every position."""

import pytest
import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import LossConfig
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.spec import DraftSpec
from tests.model.drafts import CONFIGS, LAYERS, QWEN3

VOCAB, SIZE, BLOCK, PERIOD, NUM_TOKENS = 16, 32, 4, 6, 24
ROWS, VERIFIED = 200, 13
BATCH, STEPS = 8, {"eagle3": 500}  # one layer instead of two, and seven times the work per step
CASES = [
    pytest.param(name, marks=pytest.mark.long if name == "eagle3" else ())
    for name in CONFIGS
    if name != "confidence_alone"
]


def copies(rows: int, frozen: Tensor, seed: int) -> TrainBatch:
    """Random inputs that the target repeats for ever: its last state says which token follows,
    the context which one is there.
    """
    first = torch.randint(
        0, VOCAB - 1, (rows, PERIOD), generator=torch.Generator().manual_seed(seed)
    )
    ids = first.repeat(1, NUM_TOKENS // PERIOD + 1)[:, : NUM_TOKENS + 1]
    return TrainBatch(
        input_ids=ids[:, :-1].flatten(),
        loss_mask=(torch.arange(NUM_TOKENS) >= PERIOD - 1).repeat(rows),
        lengths=torch.full((rows,), NUM_TOKENS),
        context=frozen[ids[:, :-1].flatten()].repeat(1, len(LAYERS)),
        last_hidden=3.0 * frozen[ids[:, 1:].flatten()],
        seeds=tuple(range(seed, seed + rows)),
    )


def trained(name: str) -> tuple[Drafter, Tensor]:
    changes = {"ttt_length": BLOCK} if name == "eagle3" else {"num_anchors": 8}
    target = {**QWEN3, "vocab_size": VOCAB, "hidden_size": SIZE}
    layer_ids = [0, 1, 2] if name == "eagle3" else LAYERS
    spec = DraftSpec.from_target(
        target,
        CONFIGS[name].model_copy(update=changes),
        layer_ids=layer_ids,
        mask_token_id=VOCAB - 1,
    )
    frozen = (
        torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))[0][
            :VOCAB
        ]
        * 2.0
    )
    draft = build_draft(spec, embed=frozen, lm_head=frozen, seed=0)
    draft.configure_loss(LossConfig(ce=1.0, tv=0.0, confidence=0.0, decay=None))
    steps = STEPS.get(name, 200)
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=5e-3)
    cooling = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.02, total_iters=steps
    )
    for step in range(steps):
        batch = copies(BATCH, frozen, seed=1000 * step)
        output = draft.loss(batch, draft.plan(batch))
        optimizer.zero_grad()
        (output.numerator / output.denominator).backward()
        optimizer.step()
        cooling.step()
    return draft, frozen


@pytest.mark.parametrize("name", CASES)
def test_a_draft_of_a_copying_target_is_accepted_at_every_position(name: str) -> None:
    """Trap D2: were a label one off, what is learnt in training would be wrong in every slot of
    decoding.
    """
    draft, frozen = trained(name)
    fresh = copies(ROWS, frozen, seed=7)
    ids, context = (
        tensor.unflatten(0, (ROWS, NUM_TOKENS)) for tensor in (fresh.input_ids, fresh.context)
    )
    with torch.inference_mode():
        cache = draft.new_cache(ROWS, NUM_TOKENS)
        draft.extend(cache, context[:, :VERIFIED], ids[:, 1 : VERIFIED + 1], [VERIFIED] * ROWS)
        proposal = draft.propose(cache, ids[:, VERIFIED], SamplingConfig(temperature=0), None)
    right = (proposal.tokens == ids[:, VERIFIED + 1 : VERIFIED + 1 + BLOCK]).cumprod(1).sum(0)
    reached = torch.cat([torch.tensor([ROWS]), right[:-1]])
    assert ((right / reached) > 0.95).all()
