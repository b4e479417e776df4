"""What servers are asked, and what becomes of their answers."""

import time
from pathlib import Path

import pytest

from deepspec.errors import TransientError
from tests.answer_server import always, answer_server
from tests.answers.asking import ask, row, server_run


def test_each_turn_is_asked_on_the_conversation_as_regenerated(store: Path):
    with answer_server() as server:
        server.reads = lambda body: [0, 0, 0]
        settings = ("resources.servers.max_differing_prompts=1",)
        config = server_run(store, server.url, settings=settings)
        answered, rejects = ask(config, row(1, "abc", "def"))
    assert rejects == []
    assert [turn["text"] for turn in answered[0]["turns"]] == ["cba", "fed"]
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["abc", "cba", "def"]
    turn = answered[0]["turns"][0]
    assert (
        turn["endpoint"],
        turn["served_model"],
        turn["num_tokens"],
        turn["num_prompt_tokens"],
    ) == (server.url, "demo", 5, 3)
    assert turn["seed"] == server.bodies[0]["seed"]


@pytest.mark.parametrize(
    "trouble",
    [
        "500",
        "502",
        "503",
        "429 0.2",
        "408",
        "409",
        "425",
        "hang up",
        "bad json",
        "not json",
        "no choices",
        "hang",
        "parts",
        "no message",
        "half a character",
    ],
)
def test_what_may_pass_is_tried_again(store: Path, trouble: str):
    with answer_server(lambda body, before: "answer" if before else trouble) as server:
        answered, rejects = ask(server_run(store, server.url), row(1, "abc"))
    assert (answered[0]["turns"][0]["text"], rejects, len(server.bodies)) == ("cba", [], 2)


def test_retry_after_is_honoured(store: Path):
    with answer_server(lambda body, before: "answer" if before else "429 1") as server:
        started = time.monotonic()
        ask(server_run(store, server.url), row(1, "abc"))
        assert time.monotonic() - started >= 1.0


def test_what_cannot_succeed_goes_to_the_rejects_at_once_with_the_servers_words(store: Path):
    with answer_server(always("400")) as server:
        answered, rejects = ask(server_run(store, server.url), row(1, "abc"))
    assert (answered, len(server.bodies)) == ([], 1)
    assert rejects[0]["reason"] == "http_400"
    assert "status 400" in rejects[0]["detail"]


def test_a_row_that_makes_its_server_hang_up_is_given_up_like_any_other(store: Path):
    plan = lambda body, before: "gone" if body["messages"][-1]["content"] == "poison" else "answer"  # noqa: E731
    with answer_server(plan) as server:
        config = server_run(
            store,
            server.url,
            settings=("resources.servers.request_tries=2", "resources.servers.row_runs=1"),
        )
        with pytest.raises(TransientError, match="1 of 2 rows got no answer"):
            ask(config, row(1, "a"), row(2, "poison"))
        answered, rejects = ask(config, row(1, "a"), row(2, "poison"), keep_journal=True)
    assert (len(answered), [reject["reason"] for reject in rejects]) == (1, ["failed"])


def test_a_server_that_is_away_or_overloaded_is_no_fault_of_the_row(store: Path):
    """Only what a server said about the row itself is counted: an outage must not send rows to
    the rejects.
    """
    with answer_server(lambda body, before: "answer" if before > 3 else "429 0.01") as server:
        settings = ("resources.servers.request_tries=2", "resources.servers.requests=1")
        answered, rejects = ask(server_run(store, server.url, settings=settings), row(1, "abc"))
    assert (len(answered), rejects) == (1, [])
