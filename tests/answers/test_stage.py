"""The answers stage with engines that need no model: what is kept, what is refused, what is
tried again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec.answers.sequential_shards import Engine, answer_all
from deepspec.answers.stage import run_answers
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError, ShardsFailed
from deepspec.messages import Message
from deepspec.prompts.stage import run_prompts
from deepspec.target.conversation import (
    AnswerRequest,
    Conversation,
    Refused,
    conversation_so_far,
    stream_seed,
)
from tests.answers.asking import no_progress
from tests.conftest import tiny_run
from tests.engines import Echo

ECHO = "answers.engine=tests.engines:Echo"
FLAKY = "answers.engine=tests.engines:Flaky"


def all_rows(artifact: Artifact) -> list[dict]:
    return [
        row
        for record in artifact.records().values()
        for row in read_table(artifact.fetch_shard(record)).to_pylist()
    ]


def row(number: int, *messages: str) -> dict:
    import json

    text = json.dumps([{"role": "user", "content": message} for message in messages])
    return {"id": number, "held_out": False, "domain": None, "messages": text}


def answer_rows(config: RunConfig, engine: Engine, rows: list[dict]) -> list[Conversation]:
    conversations = {row["id"]: Conversation(row, config.answers) for row in rows}
    return answer_all(conversations, engine, no_progress(), shard=0)


def test_every_prompt_is_answered_once_and_keeps_its_id_and_split(store: Path):
    config = tiny_run(store, ECHO)
    prompts = all_rows(run_prompts(Run(config)))
    answers = all_rows(run_answers(Run(config)))
    assert [(a["id"], a["held_out"], a["domain"]) for a in answers] == [
        (p["id"], p["held_out"], p["domain"]) for p in prompts
    ]
    assert all(len(answer["turns"]) == 1 for answer in answers)


def test_each_turn_is_answered_on_the_conversation_as_regenerated(store: Path):
    seen: list[AnswerRequest] = []

    class Spy(Echo):
        def answer(self, requests, *, shard):
            seen.extend(requests)
            return super().answer(requests, shard=shard)

    config = tiny_run(store)
    (conversation,) = answer_rows(config, Spy(Run(config)), [row(1, "abc", "def")])
    assert [turn.text for turn in conversation.turns] == ["cba", "fed"]
    assert [message.content for message in seen[1].messages] == ["abc", "cba", "def"]


def test_a_refused_row_goes_to_the_rejects_with_its_reason(store: Path):
    config = tiny_run(store)
    fine, refused = answer_rows(config, Echo(Run(config)), [row(1, "fine"), row(2, "refuse this")])
    assert (fine.ended, len(fine.turns)) == (None, 1)
    assert refused.ended == Refused("refused", "the test asked for it")


@pytest.mark.parametrize(
    ("setting", "texts"),
    [("keep", ["enif", "siht eta"]), ("drop", ["enif"]), ("retry", ["enif", "siht etacnurt"])],
)
def test_truncated_answers_are_kept_dropped_or_made_anew_as_set(
    store: Path, setting: str, texts: list[str]
):
    """Trap A3; a second try gets more room, the first one's limit decides nothing after it."""
    config = tiny_run(store, f"answers.truncated={setting}", "answers.max_new_tokens=8")
    found = answer_rows(config, Echo(Run(config)), [row(1, "fine"), row(2, "truncate this")])
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
    (found,) = answer_rows(config, Echo(Run(config)), [row(1, "truncate this", "x")])
    assert [(turn.text, turn.finish_reason) for turn in found.turns] == [
        ("siht etac", "length"),
        ("x", "stop"),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ("answers.retry_max_new_tokens=99",),
        ("answers.truncated=retry", "answers.retry_max_new_tokens=3"),
    ],
)
def test_a_larger_limit_that_is_none_is_refused(store: Path, settings: tuple[str, ...]):
    with pytest.raises(ConfigError, match="retry_max_new_tokens goes with"):
        tiny_run(store, *settings)


def test_a_shard_counts_its_turns_and_truncations(store: Path):
    config = tiny_run(store, ECHO)
    run_prompts(Run(config))
    counts = [record.counts for record in run_answers(Run(config)).records().values()]
    assert all(entry["turns"] == 4 and entry["truncated"] == 0 for entry in counts)


def test_a_failing_shard_leaves_the_others_committed_and_is_named(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shard 3 fails once as transient, shard 5 for good: the next runs do only what is missing."""
    monkeypatch.setenv("FLAKY_DIR", str(tmp_path))
    (tmp_path / "broken").touch()
    config = tiny_run(store, FLAKY)
    run_prompts(Run(config))
    with pytest.raises(ShardsFailed) as caught:
        run_answers(Run(config))
    assert sorted(caught.value.failures) == [3, 5]
    assert caught.value.retryable == [3]
    assert "shard 5: the prompt cannot be rendered" in str(caught.value)
    calls = tmp_path / "calls"
    calls.unlink()
    with pytest.raises(ShardsFailed):
        run_answers(Run(config), shards=[3, 5])
    assert calls.read_text().split() == ["3", "5"]
    calls.unlink()
    (tmp_path / "broken").unlink()
    artifact = run_answers(Run(config))
    assert calls.read_text().split() == ["5"]
    assert artifact.manifest() is not None


def test_the_digest_does_not_depend_on_the_order_in_which_shards_were_made(
    store: Path, tmp_path: Path
):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(store, other)
    digests = []
    for place, order in ((store, [None]), (other, [[4], [0, 2], None])):
        config = tiny_run(place, ECHO)
        run_prompts(Run(config))
        for shards in order:
            artifact = run_answers(Run(config), shards=shards)
        manifest = artifact.manifest()
        assert manifest is not None
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


def test_a_shard_that_does_not_exist_is_refused(store: Path):
    config = tiny_run(store, ECHO)
    run_prompts(Run(config))
    with pytest.raises(ConfigError, match="no shard 99; there are 0 to 5"):
        run_answers(Run(config), shards=[99])


def test_an_engine_that_cannot_be_imported_is_refused(store: Path):
    config = tiny_run(store, "answers.engine=no_such_module:Engine")
    run_prompts(Run(config))
    with pytest.raises(ConfigError, match="cannot be imported"):
        run_answers(Run(config))


def test_streams_differ_by_row_turn_and_seed():
    assert (
        len({stream_seed(seed, row, turn) for seed in (1, 2) for row in (1, 2) for turn in (0, 1)})
        == 8
    )


def test_the_conversation_ends_at_the_first_unanswered_user_message():
    messages = [Message("user", "a"), Message("user", "b")]
    assert [message.content for message in conversation_so_far(messages, []) or []] == ["a"]
    assert [message.content for message in conversation_so_far(messages, ["x"]) or []] == [
        "a",
        "x",
        "b",
    ]
    assert conversation_so_far(messages, ["x", "y"]) is None
