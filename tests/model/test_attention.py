"""Flex and dense attention of training blocks are one computation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.model import attention, block
from deepspec.model.anchors import Anchors
from deepspec.model.attention import training_path, visibility
from deepspec.model.block import BlockDraft
from tests.model.drafts import CONFIGS, TARGETS, make_batch, make_draft


@pytest.fixture(autouse=True)
def fresh_choice() -> Any:
    for choice in (attention._choose, attention._dense):
        choice.cache_clear()
    yield
    attention._choose.cache_clear()


def outcome(draft: BlockDraft, path: str, device: str, monkeypatch: pytest.MonkeyPatch, *, backward: bool) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one batch on a path."""
    monkeypatch.setattr(block, "training_path", lambda *_: path)
    batch = make_batch((14, 9))
    moved = batch._replace(**{name: value.to(device) for name, value in batch._asdict().items() if isinstance(value, Tensor)})
    with torch.set_grad_enabled(backward):
        output = draft.loss(moved, draft.plan(moved))
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    return output.numerator, list(torch.autograd.grad(output.numerator, parameters)) if backward else []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("target", TARGETS)
def test_flex_and_dense_attention_give_the_same_loss(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU flex attention has a forward pass only; grouped heads, V = K and unscaled attention included."""
    draft = make_draft(CONFIGS["vanilla"], target=target)
    assert isinstance(draft, BlockDraft)
    dense, flex = (outcome(draft, path, "cpu", monkeypatch, backward=False)[0] for path in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_flex_attention_has_the_gradients_of_dense_attention(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_draft(CONFIGS["vanilla"], target=target).to("cuda")
    assert isinstance(draft, BlockDraft)
    (dense, dense_grads), (flex, flex_grads) = (outcome(draft, path, "cuda", monkeypatch, backward=True) for path in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=0)
    for found, wanted in zip(flex_grads, dense_grads, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-3)


def test_both_masks_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = Anchors(torch.tensor([[3, 7, 7], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool))
    dense = visibility(anchors, num_tokens=9, block_size=4, path="dense")
    sparse: Any = visibility(anchors, num_tokens=9, block_size=4, path="flex")
    rows, queries, keys = torch.meshgrid(torch.arange(2), torch.arange(12), torch.arange(21), indexing="ij")
    assert torch.equal(sparse.mask_mod(rows, None, queries, keys), dense[:, 0])


def test_the_path_taken_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    draft, other = make_draft(CONFIGS["dflash"]), make_draft(target="gemma4")
    with caplog.at_level(logging.INFO, logger="deepspec.model.attention"):
        assert [training_path(each.fc.weight, each.spec.heads) for each in (draft, draft, other)] == ["dense"] * 3
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "attention=dense device=cpu" in caplog.text


def test_a_fallback_on_a_gpu_is_a_warning_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Trap D10: without compiled flex attention, memory grows with the square of the anchors."""

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image\nlong story")

    monkeypatch.setattr(attention, "probe", fail)
    heads = make_draft(CONFIGS["dflash"]).spec.heads
    assert attention._choose("cuda", torch.bfloat16, heads) == "dense"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "FALLBACK: compiled flex attention fails here" in record.message
    assert record.message.endswith("no kernel image")
    monkeypatch.setattr(attention, "probe", lambda *_: None)
    assert attention._choose("cuda", torch.float32, heads) == "flex"
