"""Flex and dense attention of training blocks are one computation."""

import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from deepspec.model import attention, attention_path, eagle3
from deepspec.model import block_draft as block
from deepspec.model.attention import TILE, BlockVisibility, tiles
from deepspec.model.attention_path import training_path
from deepspec.process import machine
from tests.model.drafts import CONFIGS, TARGETS, make_batch, make_draft


@pytest.fixture(autouse=True)
def fresh_choice() -> Any:
    for choice in (attention_path._probed, attention_path._without_flex):
        choice.cache_clear()
    yield
    attention_path._probed.cache_clear()


# Less than a tile of queries, and more: PyTorch has kernels of its own for few queries.
FEW = (14, 9, 150)
MANY = (*FEW, *[20] * 12)


def outcome(
    name: str,
    target: str,
    device: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...] = FEW,
) -> tuple[Tensor, list[Tensor]]:
    """Loss of one batch on a path, and, on a GPU, its gradients."""
    for module in (block, eagle3):
        monkeypatch.setattr(module, "training_path", lambda *_, **__: path)
    draft, batch = make_draft(CONFIGS[name], target=target).to(device), make_batch(lengths)
    moved = batch._replace(
        **{
            name: value.to(device)
            for name, value in batch._asdict().items()
            if isinstance(value, Tensor)
        }
    )
    backward = device == "cuda"
    with torch.set_grad_enabled(backward):
        output = draft.loss(moved, draft.plan(moved))
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    return output.numerator, list(
        torch.autograd.grad(output.numerator, parameters)
    ) if backward else []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["vanilla", "context", "eagle3"])
def test_flex_and_dense_attention_give_the_same_loss(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU flex attention has a forward pass only; grouped heads, V = K and unscaled
    attention included.
    """
    dense, flex = (outcome(name, target, "cpu", path, monkeypatch)[0] for path in ("dense", "flex"))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_compiled_flex_attention_has_the_gradients_of_dense_attention(
    name: str, target: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3's heads were 8 wide here, which no kernel takes: it failed on the first GPU."""
    (dense, dense_grads), (flex, flex_grads) = (
        outcome(name, target, "cuda", path, monkeypatch, lengths) for path in ("dense", "flex")
    )
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=0)
    for found, wanted in zip(flex_grads, dense_grads, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-3)


def seen_by_hand(visibility: BlockVisibility, *, num_tokens: int, copies: int) -> Tensor:
    """[n, L] bool, from what `BlockVisibility` says, one query and key at a time."""
    num_queries = len(visibility.first) * visibility.block_size
    seen = torch.zeros(num_queries, num_tokens + copies * num_queries, dtype=torch.bool)
    for query in range(num_queries):
        block = query // visibility.block_size
        seen[query, int(visibility.first[block]) : int(visibility.last[block])] = True
        for copy in range(copies):
            start = num_tokens + copy * num_queries + block * visibility.block_size
            seen[query, start : start + visibility.block_size] = True
    return seen


def listed(tiles_of: Tensor, counts: Tensor | None, order: Tensor | None) -> Tensor:
    """The tiles [rows, columns] bool that a mask's lists name."""
    assert counts is not None
    assert order is not None
    named = torch.zeros_like(tiles_of, dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        named[row, order[0, 0, row, :count].long()] = True
    return named


# Samples of 200, 3 and 300 tokens, then fill.
LONG = BlockVisibility(
    torch.tensor([0] * 30 + [200] + [203] * 40 + [0]),
    torch.tensor([*range(5, 185, 6), 201, *range(210, 490, 7), 0]),
    7,
    "flex",
)
EAGLE = BlockVisibility(
    torch.tensor([0] * 9 + [12] * 3), torch.tensor([*range(4, 13), 14, 15, 16]), 1, "flex"
)


@pytest.mark.parametrize(
    ("visibility", "num_tokens", "copies"),
    [(LONG, 512, 1), (LONG, 505, 1), (EAGLE, 20, 0), (EAGLE, 20, 3)],
)
def test_the_mask_of_flex_attention_says_what_is_seen_and_no_tile_of_it_is_missing(
    visibility: BlockVisibility, num_tokens: int, copies: int
) -> None:
    wanted = seen_by_hand(visibility, num_tokens=num_tokens, copies=copies)
    mask = tiles(visibility, num_tokens=num_tokens, copies=copies)
    queries, keys = torch.meshgrid(*(torch.arange(size) for size in wanted.shape), indexing="ij")
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), queries, keys), wanted)
    room = torch.nn.functional.pad(wanted, (0, -wanted.shape[1] % TILE, 0, -wanted.shape[0] % TILE))
    by_tile = room.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).sum((1, 3))
    partial = listed(by_tile, mask.kv_num_blocks, mask.kv_indices)
    whole = listed(by_tile, mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    assert torch.equal((partial | whole) & (by_tile > 0), by_tile > 0)
    assert (by_tile[whole] == TILE * TILE).all()
    # tiles of two samples may span more than either sees
    assert (partial & (by_tile == 0)).float().mean() < 0.1


def test_whole_tiles_are_found() -> None:
    visibility = BlockVisibility(
        torch.zeros(64, dtype=torch.long), torch.full((64,), 300), 4, "flex"
    )
    counts = tiles(visibility, num_tokens=512, copies=1).full_kv_num_blocks
    assert counts is not None
    assert counts.sum() == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("name", "num_kinds"), [("vanilla", 1), ("eagle3", 3)])
def test_the_layers_of_a_batch_share_a_mask(
    name: str, num_kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer made its own: 75 kernels and 2 copies from the host, five times a batch. Each
    step of Eagle3 sees other keys.
    """
    made: list[int] = []

    def counted(*args: Any, copies: int, **how: Any) -> Any:
        made.append(copies)
        return tiles(*args, copies=copies, **how)

    monkeypatch.setattr(attention, "tiles", counted)
    for batch in (1, 2):
        with torch.no_grad():
            outcome(name, "qwen3", "cpu", "flex", monkeypatch)
        assert len(made) == batch * num_kinds
    assert len(set(made)) == num_kinds


@pytest.mark.parametrize(("visibility", "copies"), [(LONG, 1), (EAGLE, 3)])
def test_the_lists_of_a_mask_are_those_that_pytorch_makes(
    visibility: BlockVisibility, copies: int
) -> None:
    """PyTorch turns lists by queries into lists by keys on the device, and waits for it twice."""
    mask = tiles(visibility, num_tokens=512, copies=copies)
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    made = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, seq_lengths=mask.seq_lengths)
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        found, wanted = getattr(mask, name), getattr(made, name)
        assert torch.equal(found, wanted)
        assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())
    assert mask.BLOCK_SIZE == made.BLOCK_SIZE


def test_the_path_taken_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    draft, other = make_draft(CONFIGS["dflash"]), make_draft(target="gemma4")
    with caplog.at_level(logging.INFO, logger="deepspec.model.attention_path"):
        assert [
            training_path(each.fc.weight, each.spec, block_size=4) for each in (draft, draft, other)
        ] == ["dense"] * 3
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "attention=dense device=cpu" in caplog.text


def test_a_fallback_on_a_gpu_is_one_warning_that_names_the_cost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Trap D10: without compiled flex attention, memory grows with the square of the anchors."""

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image\nlong story")

    monkeypatch.setattr(attention_path, "probe", fail)
    heads = make_draft(CONFIGS["dflash"]).spec.heads
    assert [attention_path._probed(torch.bfloat16, heads, 1.0, 4) for _ in range(2)] == [
        "dense"
    ] * 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "FALLBACK: compiled flex attention fails here" in record.message
    assert f"{4 * heads.num_heads} bytes for every query and every token" in record.message
    assert record.message.endswith("no kernel image")
    monkeypatch.setattr(attention_path, "probe", lambda *_: None)
    assert attention_path._probed(torch.float32, heads, 1.0, 4) == "flex"


def test_without_pythons_headers_it_falls_back_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler's own failure is none of PyTorch's errors, and ended training."""

    def compile_launcher(*_: object) -> None:
        source = tmp_path / "launcher.c"
        source.write_text('#include "Python.h"\n')
        command = ["gcc", "-c", str(source), "-o", str(tmp_path / "launcher.o")]
        subprocess.check_call(command, stderr=subprocess.DEVNULL)

    monkeypatch.setattr(attention_path, "probe", compile_launcher)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    assert attention_path._probed(torch.bfloat16, make_draft().spec.heads, 1.0, 4) == "dense"
    fallback, lacks = caplog.messages
    assert "FALLBACK" in fallback and "gcc" in fallback
    assert f"Python's headers ({tmp_path / 'Python.h'}), not found here" in lacks


def test_a_probe_without_memory_is_no_reason_to_take_the_path_that_needs_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(attention_path, "probe", fail)
    with pytest.raises(torch.OutOfMemoryError):
        attention_path._probed(torch.bfloat16, make_draft().spec.heads, 1.0, 4)
