"""Batches of capture that run out of memory are done again in halves, with the same states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.config.data import HiddenConfig
from deepspec.errors import OutOfMemory
from deepspec.hidden.capture import Capture
from deepspec.hidden.sequences import CaptureRow
from deepspec.target.model import Target, TargetCache, TargetOutput
from tests.target.tiny_target import make_target

LENGTHS = (3, 5, 5, 8, 9, 13, 20, 21)
BATCH_TOKENS = 64


def some_rows() -> list[CaptureRow]:
    generator = torch.Generator().manual_seed(0)
    return [
        CaptureRow(number, False, ids.tolist(), [True] * len(ids))
        for number, length in enumerate(LENGTHS)
        for ids in [torch.randint(97, (length,), generator=generator)]
    ]


def limit_tokens(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a pass of more tokens run out of memory at its end; the tokens of all passes."""
    tokens: list[int] = []
    forward, forward_packed = Target.forward, Target.forward_packed

    def check(num_tokens: int) -> None:
        tokens.append(num_tokens)
        if num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    def padded(self: Target, ids: Tensor, cache: TargetCache | None = None) -> TargetOutput:
        output = forward(self, ids, cache)
        check(ids.numel())
        return output

    def packed(self: Target, sequences: Any) -> list[TargetOutput]:
        outputs = forward_packed(self, sequences)
        check(sum(map(len, sequences)))
        return outputs

    monkeypatch.setattr(Target, "forward", padded)
    monkeypatch.setattr(Target, "forward_packed", packed)
    return tokens


def capture(*, packs: bool) -> Capture:
    target, layout = make_target(), None
    target.packs = packs
    return Capture(target, layout, HiddenConfig(), BATCH_TOKENS)  # type: ignore[arg-type]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("most", [21, 30, 45, 1000])
def test_a_batch_that_runs_out_of_memory_is_done_again_in_halves(
    monkeypatch: pytest.MonkeyPatch, most: int, packs: bool
) -> None:
    rows, whole = some_rows(), capture(packs=packs)
    expected = list(whole.states(rows))
    assert whole.pieces.num_splits == 0
    tokens, halved = limit_tokens(monkeypatch, most), capture(packs=packs)
    found = list(halved.states(rows))
    assert [row for row, _ in found] == rows
    for (_, states), (_, wanted) in zip(found, expected, strict=True):
        torch.testing.assert_close(states.context, wanted.context, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states.last_hidden, wanted.last_hidden, atol=1e-5, rtol=1e-4)
    assert halved.pieces.num_splits == sum(count > most for count in tokens)
    assert (halved.pieces.num_splits > 0) == (most < BATCH_TOKENS)


def test_a_sequence_that_does_not_fit_by_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_tokens(monkeypatch, 20)
    with pytest.raises(OutOfMemory, match="a sequence of 21 tokens do not fit") as caught:
        list(capture(packs=False).states(some_rows()))
    assert caught.value.where == "sample 0000000000000007"
    assert "lower hidden.max_length (now 4096)" in caught.value.fix
