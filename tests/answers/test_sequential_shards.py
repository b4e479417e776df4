"""Shards answered by an engine in this process: what is kept, refused or made anew."""

from pathlib import Path

import pytest

from deepspec.answers.sequential_shards import Engine, SequentialShards
from deepspec.config.run import RunConfig
from deepspec.target.conversation import AnswerRequest, Conversation, Refused
from tests.answers.asking import no_progress, row, stage_of
from tests.conftest import tiny_run
from tests.engines import Echo


def answer_rows(config: RunConfig, engine: Engine, rows: list[dict]) -> list[Conversation]:
    stage = stage_of(config, rows)
    (answered,) = SequentialShards(engine, stage, config.answers, no_progress())
    return answered.conversations()


def test_each_turn_is_answered_on_the_conversation_as_regenerated(store: Path):
    seen: list[AnswerRequest] = []

    class Spy(Echo):
        def answer(self, requests, *, shard):
            seen.extend(requests)
            return super().answer(requests, shard=shard)

    config = tiny_run(store)
    (conversation,) = answer_rows(config, Spy(config), [row(1, "abc", "def")])
    assert [turn.text for turn in conversation.turns] == ["cba", "fed"]
    assert [message.content for message in seen[1].messages] == ["abc", "cba", "def"]


def test_a_refused_row_goes_to_the_rejects_with_its_reason(store: Path):
    config = tiny_run(store)
    fine, refused = answer_rows(config, Echo(config), [row(1, "fine"), row(2, "refuse this")])
    assert (fine.ended, len(fine.turns)) == (None, 1)
    assert refused.ended == Refused("refused", "the test refuses it")


@pytest.mark.parametrize(
    ("setting", "texts"),
    [("keep", ["enif", "siht eta"]), ("drop", ["enif"]), ("retry", ["enif", "siht etacnurt"])],
)
def test_truncated_answers_are_kept_dropped_or_made_anew_as_set(
    store: Path, setting: str, texts: list[str]
):
    """Trap A3; a second try gets more room, the first one's limit decides nothing after it."""
    config = tiny_run(store, f"answers.truncated={setting}", "answers.max_new_tokens=8")
    found = answer_rows(config, Echo(config), [row(1, "fine"), row(2, "truncate this")])
    assert [turn.text for conversation in found for turn in conversation.turns] == texts
    assert all(
        conversation.turns or isinstance(conversation.ended, Refused) for conversation in found
    )


def test_an_answer_that_runs_into_the_larger_limit_too_is_kept_as_truncated(store: Path):
    config = tiny_run(
        store,
        "answers.truncated=retry",
        "answers.max_new_tokens=4",
        "answers.retry_max_new_tokens=9",
    )
    (found,) = answer_rows(config, Echo(config), [row(1, "truncate this", "x")])
    assert [(turn.text, turn.finish_reason) for turn in found.turns] == [
        ("siht etac", "length"),
        ("x", "stop"),
    ]
