"""What a server read as the prompt: compared, kept, and trained on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepspec.answers.answered_shard import write_answers
from deepspec.answers.journal import journal_path
from deepspec.answers.read_prompts import ids_to_keep
from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.errors import DataError
from deepspec.hidden.sequences import capture_rows
from deepspec.messages import parse_messages
from deepspec.prompts.stage import run_prompts
from deepspec.target.chat import Chat, load_chat
from deepspec.target.conversation import AnswerRequest
from tests.answer_server import AnswerServer, answer_server
from tests.answers.asking import ask, concurrent, row, server_run, stage_of
from tests.conftest import tiny_run, write_jsonl

QUESTIONS = [f"question {number}" for number in range(100)]
Reads = Callable[[dict[str, Any]], list[int]]


@pytest.fixture
def chat(store: Path) -> Chat:
    return load_chat(Run(tiny_run(store)))


def reads(chat: Chat, *, otherwise: Sequence[str] = ()) -> Reads:
    """A server with the target's own template, which reads some questions twice over."""

    def prompt_ids(body: dict[str, Any]) -> list[int]:
        messages = parse_messages(json.dumps(body["messages"]))
        if messages[-1].content in otherwise:
            messages[-1] = messages[-1]._replace(content=2 * messages[-1].content)
        return chat.render(messages, body.get("tools"))

    return prompt_ids


def served(server: AnswerServer, reads: Reads, *, gives_ids: bool = True) -> AnswerServer:
    server.reads, server.owner = reads, "vllm" if gives_ids else "somebody"
    return server


@pytest.mark.parametrize("gives_ids", [True, False])
def test_a_server_with_another_template_is_found_by_its_first_answers(
    store: Path, chat: Chat, gives_ids: bool
):
    """And what it answered is not taken for answers of the right one."""
    with answer_server() as server:
        served(server, reads(chat, otherwise=QUESTIONS), gives_ids=gives_ids)
        settings = ("resources.servers.requests=1",)
        config = server_run(store, server.url, settings=settings)
        rows = [row(number, text) for number, text in enumerate(QUESTIONS)]
        with pytest.raises(DataError, match="6 of 100 so far") as caught:
            ask(config, *rows)
        assert len(server.bodies) < 20
        if gives_ids:
            ours = chat.render(parse_messages(rows[0]["messages"]))
            assert f"reads 'q' ({ours[-8]}" in caught.value.what or "instead of" in str(
                caught.value
            )
        server.bodies.clear()
        server.reads = reads(chat)
        answered, _ = ask(config, *rows, keep_journal=True)
    assert (len(answered), len(server.bodies)) == (100, 100)
    assert "prompt_token_ids" not in answered[0]["turns"][0]


def test_the_first_difference_is_named_by_position_and_text(store: Path, chat: Chat):
    ours = chat.render(parse_messages(row(1, "What is 2 + 2?")["messages"]))
    theirs = [*ours[:3], ours[0], *ours[4:]]
    texts = [chat.tokenizer.decode([token]) for token in (theirs[3], ours[3])]
    with answer_server() as server:
        served(server, lambda body: theirs)
        with pytest.raises(DataError) as caught:
            ask(server_run(store, server.url), row(1, "What is 2 + 2?"))
    expected = f"{texts[0]!r} ({theirs[3]}) instead of {texts[1]!r} ({ours[3]}) at position 3"
    assert f"{server.url} reads {expected}" in caught.value.what


def test_training_uses_what_the_server_read(store: Path, chat: Chat):
    """Row 0 is read otherwise, which 5 % of the rows may be; of the others nothing is stored."""
    with answer_server() as server:
        served(server, reads(chat, otherwise=["question 0"]))
        config = server_run(store, server.url)
        answered, _ = ask(config, *(row(number, text) for number, text in enumerate(QUESTIONS)))
    kept = [found["turns"][0]["prompt_token_ids"] for found in answered]
    twice = chat.render(parse_messages(row(0, 2 * "question 0")["messages"]))
    assert kept == [twice, *[None] * 99]
    samples = {found.sample_id: found for found in capture_rows(answered, chat, config.hidden).rows}
    assert samples[0].input_ids[: len(twice)] == twice
    ours = chat.render(parse_messages(row(1, "question 1")["messages"]))
    assert samples[1].input_ids[: len(ours)] == ours
    assert samples[1].loss_mask[: len(ours)] == [False] * len(ours)


def test_every_server_may_be_accepted_and_its_answers_outlive_a_kill(store: Path, chat: Chat):
    with answer_server() as server:
        served(server, reads(chat, otherwise=QUESTIONS))
        settings = ("resources.servers.max_differing_prompts=1",)
        config = server_run(store, server.url, settings=settings)
        rows = [row(number, text) for number, text in enumerate(QUESTIONS)]
        for _ in range(2):
            answered, _ = ask(config, *rows, keep_journal=True)
    assert (len(answered), len(server.bodies)) == (100, 100)
    assert all(found["turns"][0]["prompt_token_ids"] for found in answered)


def test_a_server_that_reports_nothing_about_prompts_is_not_compared(store: Path):
    with answer_server() as server:
        answered, rejects = ask(server_run(store, server.url), row(1, "a"))
    assert (len(answered), rejects) == (1, [])


def test_without_the_targets_tokenizer_servers_are_believed(
    store: Path, tmp_path: Path, chat: Chat, caplog: pytest.LogCaptureFixture
):
    """Nothing is compared or counted; what a server reports is kept for training."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in QUESTIONS[:5]])
    source = json.dumps({"kind": "files", "paths": [str(prompts)]})
    benchmark = write_jsonl(tmp_path / "b.jsonl", [{"turns": ["hello"]}])
    with answer_server(models=()) as server:
        served(server, reads(chat, otherwise=QUESTIONS))
        settings = (
            f"prompts.source={source}",
            f'evaluate.benchmarks=[{{"name": "{benchmark}"}}]',
            "demo=null",
            "target.model=nobody/none",
            "resources.servers.dialect=vllm",
        )
        run = Run(server_run(store, server.url, settings=settings))
        run_prompts(run)
        artifact = run_answers(run)
    rows = [row for record in artifact.records().values() for row in artifact.rows(record)]
    assert len(rows) == 5 and all(row["turns"][0]["prompt_token_ids"] for row in rows)
    assert "the tokenizer cannot be loaded" in caplog.text


def test_a_conversation_that_the_template_refuses_is_not_sent(store: Path, chat: Chat):
    """Capture could not render it either."""
    folder = next(store.glob("demo/*/target"))
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('no digits') if '7' in messages[0].content }}ok")
    with answer_server() as server:
        config = server_run(store, server.url)
        answered, rejects = ask(config, row(1, "a"), row(2, "7"))
    assert ([found["id"] for found in answered], len(server.bodies)) == ([1], 1)
    assert rejects[0]["reason"] == "template" and "no digits" in rejects[0]["detail"]


def test_tools_in_another_order_than_they_are_stored_in_are_kept_with_their_prompt(
    store: Path, chat: Chat
):
    """The demo's template leaves tools out, Qwen3's writes them as it finds them."""
    messages = parse_messages(row(1, "1 + 1?")["messages"])
    tools = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
    request = AnswerRequest(1, messages, 7, 12, tools)
    ids = chat.render(messages, tools)
    assert ids_to_keep(chat, request, ids, rendered=ids) is None
    chat.tokenizer.chat_template = "{{ tools | tojson }}{{ messages[0].content }}"
    ids = chat.render(messages, tools)
    assert ids_to_keep(chat, request, ids, rendered=ids) == ids


def test_shards_without_prompt_ids_are_written_as_before(store: Path, chat: Chat):
    """Byte for byte: earlier shards of a run keep their checksums' meaning."""
    stored = []
    for otherwise in ([], ["question 0"]):
        with answer_server() as server:
            served(server, reads(chat, otherwise=otherwise))
            settings = ("resources.servers.max_differing_prompts=1",)
            config = server_run(store, server.url, settings=settings)
            stage = stage_of(config, [row(0, "question 0")])
            journal_path(stage.artifact, 0).unlink(missing_ok=True)
            with concurrent(config, stage) as shards:
                (answered,) = shards
                write_answers(stage.artifact, answered, store / "out", max_refused=1)
            stored.append((store / "out").read_bytes())
    assert b"prompt_token_ids" not in stored[0] and b"prompt_token_ids" in stored[1]
