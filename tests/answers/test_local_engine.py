"""The in-process engine on the demo's target: how many rows share a pass changes no answer."""

import logging
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from deepspec.answers import local_engine
from deepspec.answers.local_engine import TransformersEngine
from deepspec.artifacts.run import Run
from deepspec.errors import OutOfMemory
from deepspec.messages import Message
from deepspec.target.conversation import AnswerRequest, Turn
from deepspec.target.generate import generate
from deepspec.target.model import Target, TargetCache, TargetOutput
from tests.conftest import tiny_run

NEW_TOKENS = 12
REQUESTS = [
    AnswerRequest(number, [Message("user", "x" * (3 * number % 19 + 1))], 1000 + number, NEW_TOKENS)
    for number in range(11)
]


@pytest.fixture
def engine(demo_store: Path) -> TransformersEngine:
    return TransformersEngine(Run(tiny_run(demo_store, "resources.memory.answer_rows=8")))


def answers_of(engine: TransformersEngine) -> dict[int, list[int] | None]:
    outcomes = [(request.id, outcome) for request, outcome in engine.answer(REQUESTS, shard=0)]
    assert sorted(number for number, _ in outcomes) == list(range(len(REQUESTS)))
    assert all(isinstance(outcome, Turn) for _, outcome in outcomes)
    return {number: turn.token_ids for number, turn in outcomes if isinstance(turn, Turn)}


def rows_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call of `generate` from now on."""
    rows: list[int] = []

    def counted(target, prompts, *rest, **named):
        rows.append(len(prompts))
        return generate(target, prompts, *rest, **named)

    monkeypatch.setattr(local_engine, "generate", counted)
    return rows


def limit_cache(monkeypatch: pytest.MonkeyPatch, fits) -> None:
    """Let a pass run out of memory unless `fits(cache)`, once it has written to the cache."""
    original = Target.forward

    def limited(self: Target, ids: Tensor, cache: TargetCache | None = None) -> TargetOutput:
        output = original(self, ids, cache)
        if cache is not None and not fits(cache):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return output

    monkeypatch.setattr(Target, "forward", limited)


def test_rows_follow_from_the_memory_that_is_left(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """64 rows were decoded together however little memory there was: a stack trace on 24 GB."""
    expected, rows = answers_of(engine), rows_decoded(monkeypatch)
    longest = max(len(engine.chat.render(request.messages)) for request in REQUESTS)
    needed = engine.target.row_bytes(longest + NEW_TOKENS)
    monkeypatch.setattr(local_engine, "usable_bytes", lambda _: 4 * needed)
    with caplog.at_level(logging.WARNING):
        assert answers_of(engine) == expected
    assert rows == [5, 4, 2]  # five of the shortest prompts, at most four of any
    assert caplog.text.count("instead of resources.memory.answer_rows=8") == 1


def test_rows_are_never_more_than_the_setting(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_decoded(monkeypatch)
    monkeypatch.setattr(local_engine, "usable_bytes", lambda _: 10**15)
    answers_of(engine)
    assert rows == [8, 3]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_rows_that_run_out_of_memory_are_answered_again_in_halves(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Bytes are counted from the cache's own tensors."""
    expected, rows = answers_of(engine), rows_decoded(monkeypatch)
    longest = max(len(engine.chat.render(request.messages)) for request in REQUESTS)
    budget = most * engine.target.row_bytes(longest + NEW_TOKENS)
    limit_cache(monkeypatch, lambda cache: cache.num_bytes <= budget)
    assert answers_of(engine) == expected
    assert engine.pieces.num_splits
    assert rows.count(8) == 1  # what ran out once is not tried again


def test_memory_that_runs_out_in_the_middle_of_answers_changes_none(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, passes = answers_of(engine), []

    def fits(cache: TargetCache) -> bool:
        passes.append(len(cache.lengths))
        return len(passes) != 6

    limit_cache(monkeypatch, fits)
    assert answers_of(engine) == expected
    assert engine.pieces.num_splits == 1


def test_a_prompt_that_does_not_fit_by_itself_is_named(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_cache(monkeypatch, lambda _: False)
    engine.target._token_bytes = [(engine.target.device, 1)] * 4  # known from before
    with pytest.raises(
        OutOfMemory, match=r"a prompt of \d+ tokens and its answer of up to 12 "
    ) as e:
        answers_of(engine)
    assert "lower answers.max_new_tokens (here 12)" in e.value.fix
    assert e.value.where.startswith("prompt 00000000000000")


def test_a_prompt_that_cannot_fit_is_refused_before_any_is_decoded(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_decoded(monkeypatch)
    need = engine.target.row_bytes(NEW_TOKENS)
    memory = psutil.virtual_memory()._replace(available=need)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(OutOfMemory, match=r"need 0\.\d+ GB, 0\.\d+ GB are free"):
        answers_of(engine)
    assert rows == []
