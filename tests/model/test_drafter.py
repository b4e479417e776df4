"""What training may do to a draft without changing what it computes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.checkpoint import load_draft, save_draft
from deepspec.model.drafter import Drafter
from tests.model.drafts import CONFIGS, make_batch, make_draft

TARGETS = ("qwen3", "gemma4")


def of_a_bfloat16_target(name: str, target: str) -> Drafter:
    draft = make_draft(CONFIGS[name], target=target)
    for frozen in (draft.embed_tokens, draft.lm_head):
        frozen.to(torch.bfloat16).float()  # rounds as the values of such a target are
    return draft


def learn(draft: Drafter) -> dict[str, Tensor]:
    """Loss and gradients of a micro-batch computed in bfloat16."""
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = draft.loss(batch, draft.plan(batch))
    output.numerator.backward()
    named = draft.named_parameters()
    gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    return gradients | output.numerators | {"numerator": output.numerator.detach()}


def drafted(draft: Drafter) -> list[Tensor | None]:
    """What is drafted by float32 weights after a verified text, as training measures it."""
    batch, cache = make_batch((9,)), draft.eval().new_cache(1, 9)
    draft.extend(cache, batch.context[None], batch.input_ids.roll(-1)[None], [9])
    uniforms = torch.rand(1, draft.block_size, generator=torch.Generator().manual_seed(0))
    return [*draft.propose(cache, batch.input_ids[-1:], SamplingConfig(temperature=1.0), uniforms)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_weights_in_the_targets_dtype_change_no_bit(name: str, target: str, tmp_path: Path):
    """They were float32, twice as large, and copied to bfloat16 for every micro-batch."""
    plain, held = (of_a_bfloat16_target(name, target) for _ in range(2))
    held.hold_frozen(torch.bfloat16)
    assert held.embed_tokens.weight.dtype == held.lm_head.weight.dtype == torch.bfloat16
    lm_head = held.lm_head.weight
    assert held.vocabulary().lm_head.to(torch.bfloat16) is lm_head, "no copy is made of it"
    torch.testing.assert_close(learn(held), learn(plain), rtol=0, atol=0)
    torch.testing.assert_close(drafted(held), drafted(plain), rtol=0, atol=0)
    for draft, folder in ((plain, tmp_path / "plain"), (held, tmp_path / "held")):
        save_draft(draft, folder)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    held.load_state_dict(load_draft(tmp_path / "held").state_dict())
    assert held.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(drafted(held), drafted(plain), rtol=0, atol=0)
