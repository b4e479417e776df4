"""The work of a training step by arithmetic, against what PyTorch counts and what is known."""

from typing import cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._step_work import Sizes, step_work
from benchmarks._training import QWEN3_4B
from deepspec.config.recipes import load_run
from deepspec.model.block_draft import BlockDraft
from deepspec.model.spec import DraftSpec
from tests.model.drafts import DFLASH, dspark, make_batch, make_draft

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)  # attention's are others


@pytest.mark.parametrize("target", ["qwen3", "gemma4"])
@pytest.mark.parametrize("config", [DFLASH, dspark(confidence=None)], ids=["dflash", "dspark"])
def test_products_are_those_that_pytorch_counts(config: object, target: str):
    draft = cast("BlockDraft", make_draft(config, target=target))
    batch = make_batch((60, 45, 31))
    plan = draft.plan(batch)
    with FlopCounterMode(display=False) as counter:
        draft.loss(batch, plan).numerator.backward()
    counted = counter.get_flop_counts()["Global"]
    sizes = Sizes.of(plan, chunk_slots=10**6, num_trained=0, width=4)
    work = step_work(draft.spec, sizes)
    assert sizes.num_counted > 0
    assert sum(counted.get(product, 0) for product in PRODUCTS) == sum(
        part.flops for name, part in work.items() if name != "flex"
    )


def test_a_micro_batch_of_qwen3_4b_is_154_tflop():
    """8,192 tokens, 4,400 blocks, 29,260 slots of which count, about 7,000 target positions."""
    run = load_run("dspark-qwen3-4b", store=".")
    ids = {"layer_ids": run.target.layer_ids, "mask_token_id": run.target.mask_token_id}
    spec = DraftSpec.from_target(QWEN3_4B, run.draft, **ids)
    sizes = Sizes(8192, 30_800, 29_260, 7000, 30_800 * 460, 883, 615_000_000, 2)
    work = step_work(spec, sizes)
    assert sum(part.flops for name, part in work.items() if name != "flex") == pytest.approx(
        154e12, rel=0.01
    )
    # Larger chunks read lm_head less often.
    small = step_work(spec, sizes._replace(chunk_slots=220))
    assert small["loss"].num_bytes > 2 * work["loss"].num_bytes
    assert small["loss"].flops == pytest.approx(work["loss"].flops)
