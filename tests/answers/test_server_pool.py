"""The pool: what each server is given, and when all of them count as lost."""

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from deepspec.answers.server_engine import LOOK_S
from deepspec.answers.server_pool import LONGEST_PAUSE_S, PooledServer
from deepspec.artifacts.run import Run
from deepspec.errors import TransientError
from deepspec.messages import Message
from deepspec.process.machine import free_port
from deepspec.target.chat import load_chat
from tests.answer_server import answer_server
from tests.answers.asking import ask, connect, row, server_run
from tests.conftest import tiny_run


def test_a_slow_server_is_not_lost_while_it_is_at_work(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row 2 fails again and again while row 1 takes longer than `lost_s`: its answer is on its
    way.
    """
    monkeypatch.setattr("deepspec.answers.server_pool.PAUSE_S", 0.02)

    def plan(body, before):
        if body["messages"][-1]["content"] == "slow":
            return "slow"
        return "500" if before < 3 else "answer"

    with answer_server(plan) as server:
        settings = (
            "resources.servers.lost_s=0.2",
            "resources.servers.request_timeout_s=10",
            "resources.servers.request_tries=20",
        )
        answered, _ = ask(
            server_run(store, server.url, settings=settings), row(1, "slow"), row(2, "x")
        )
    assert len(answered) == 2


def test_losing_every_server_fails_the_shard_as_transient(store: Path):
    with answer_server() as server:
        pass  # it is gone again, its port closed
    config = server_run(
        store,
        server.url,
        settings=("resources.servers.lost_s=0.5", "resources.servers.request_tries=50"),
    )
    with pytest.raises(TransientError, match="no server has answered"):
        ask(config, *(row(number, "x") for number in range(8)))


def test_one_of_two_servers_lost_loses_nothing(store: Path):
    with answer_server() as gone:
        pass
    with answer_server() as server:
        answered, rejects = ask(
            server_run(store, gone.url, server.url),
            *(row(number, f"p{number}") for number in range(200)),
        )
    assert (len(answered), rejects) == (200, [])


def test_an_overloaded_server_is_given_less_and_by_and_by_more():
    server = PooledServer("http://x/v1", 32)
    sent = time.monotonic()
    for _ in range(32):  # all of one volley: one sign of overload, not 32
        server.note_overload(sent)
    assert server.room == 16
    for _ in range(600):
        server.note_answer()
    assert server.room == 32
    for _ in range(32):
        server.note_failure(sent)
    assert server.room == 0  # paused
    # not for a minute, as after 32 failures one by one
    assert server.paused_until < time.monotonic() + 2
    server.paused_until = 0
    assert server.room == 1  # is probed
    server.note_answer()
    assert server.room == 32


def num_tokens(store: Path, prompt: str) -> int:
    return len(load_chat(Run(tiny_run(store))).render([Message("user", prompt)]))


def test_a_row_that_no_server_has_room_for_is_not_sent_and_counts_against_none(store: Path):
    """vLLM answered 400, a refusal of the server: with enough long rows the shard failed."""
    long, short = "word " * 40, "word"
    with answer_server() as server:
        server.max_model_len = num_tokens(store, long)
        settings = ("resources.servers.max_refused=0",)
        config = server_run(store, server.url, settings=settings)
        answered, rejects = ask(config, row(1, long), row(2, short), row(3, short, long))
    assert [found["id"] for found in answered] == [2]
    assert [found["reason"] for found in rejects] == ["too_long", "too_long"]
    assert f"max_model_len is {server.max_model_len}" in rejects[0]["detail"]
    assert len(server.bodies) == 2  # the short row, and the first turn of the last one


def test_an_answer_may_have_what_the_prompt_leaves_of_the_context(store: Path):
    """12 tokens, and 48 in a retry, are the limits; a retry that has no more room is not made."""
    prompt = "word " * 10
    for room, limits in ((5, [5]), (20, [12, 20]), (100, [12, 48])):
        with answer_server(lambda body, before: "truncate") as server:
            server.max_model_len = num_tokens(store, prompt) + room
            config = server_run(store, server.url, settings=("answers.truncated=retry",))
            ask(config, row(1, prompt))
        assert [body["max_tokens"] for body in server.bodies] == limits


def test_long_rows_go_to_the_servers_with_room_for_them_and_keep_none_from_the_others(store: Path):
    """Whichever server takes a row, its answer has the same limit."""
    long = "word " * 40
    with ExitStack() as stack:
        # the one with room has no room for a second request, and takes a while
        plan = lambda body, before: "slow" if body["messages"][0]["content"] == long else "answer"  # noqa: E731
        large, small = (stack.enter_context(answer_server(plan)) for _ in range(2))
        large.max_model_len = num_tokens(store, long) + 12
        small.max_model_len = num_tokens(store, long) + 11
        settings = ("resources.servers.requests=1", "resources.servers.request_timeout_s=10")
        config = server_run(store, large.url, small.url, settings=settings)
        rows = [row(1, long), row(2, long), *(row(number, "word") for number in range(3, 40))]
        answered, rejects = ask(config, *rows)
    assert (len(answered), rejects) == (39, [])
    assert {body["max_tokens"] for body in [*large.bodies, *small.bodies]} == {12}
    assert sum(body["messages"][0]["content"] == long for body in large.bodies) == 2
    assert len(small.bodies) > 30  # while the other one answered the first long row


def test_a_server_that_comes_up_later_is_used_within_seconds_and_known_for_what_it_is(store: Path):
    """It was taken as one of unknown kind, which is not sent the sampling that vLLM takes from the
    model's own defaults.
    """
    port = free_port()
    with connect(server_run(store, f"http://127.0.0.1:{port}/v1")) as engine:
        (server,) = engine.pool.servers
        assert server.room == 0
        with answer_server(port=port) as late:
            late.owner, late.max_model_len = "vllm", 77
            wait_for_room(server)
            assert server.max_model_len == 77
            client = engine.clients[server.url]
            assert client.fields["top_k"] == -1


def test_a_server_that_is_back_is_used_within_seconds_however_long_it_was_to_rest(store: Path):
    port = free_port()
    command = [sys.executable, "-m", "tests.answer_server", str(port), "demo"]
    with ExitStack() as stack:
        engine = stack.enter_context(connect(server_run(store, f"http://127.0.0.1:{port}/v1")))
        (server,) = engine.pool.servers
        for runs in range(2):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            wait_for_room(server)
            process.kill()
            for _ in range(12):
                server.note_failure(time.monotonic())
            assert server.paused_until > time.monotonic() + LONGEST_PAUSE_S / 2
            time.sleep(0 if runs else 2 * LOOK_S)  # it is found away
            assert server.room == 0


def wait_for_room(server: PooledServer) -> None:
    limit = time.monotonic() + 10
    while server.room < 1:
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_server_that_is_up_and_fails_all_the_same_rests_as_long_as_before(store: Path):
    """Probed every second, it would cost its rows their attempts."""
    with answer_server() as up, connect(server_run(store, up.url)) as engine:
        (server,) = engine.pool.servers
        for _ in range(12):
            server.note_failure(time.monotonic())
        time.sleep(2.5 * LOOK_S)
        assert server.room == 0


def test_a_server_that_comes_back_with_another_model_is_not_used(store: Path):
    port = free_port()
    with (
        connect(server_run(store, f"http://127.0.0.1:{port}/v1")) as engine,
        answer_server(port=port, models=("another",)) as other,
    ):
        (server,) = engine.pool.servers
        time.sleep(2.5 * LOOK_S)
        assert server.room == 0 and other.bodies == []
