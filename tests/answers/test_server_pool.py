"""The pool: what each server is given, and when all of them count as lost."""

import time
from pathlib import Path

import pytest

from deepspec.answers.server_pool import PooledServer
from deepspec.errors import TransientError
from tests.answer_server import answer_server
from tests.answers.asking import ask, row, server_run


def test_a_slow_server_is_not_lost_while_it_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            server_run(tmp_path, server.url, settings=settings), row(1, "slow"), row(2, "x")
        )
    assert len(answered) == 2


def test_losing_every_server_fails_the_shard_as_transient(tmp_path: Path):
    with answer_server() as server:
        pass  # it is gone again, its port closed
    config = server_run(
        tmp_path,
        server.url,
        settings=("resources.servers.lost_s=0.5", "resources.servers.request_tries=50"),
    )
    with pytest.raises(TransientError, match="no server has answered"):
        ask(config, *(row(number, "x") for number in range(8)))


def test_one_of_two_servers_lost_loses_nothing(tmp_path: Path):
    with answer_server() as gone:
        pass
    with answer_server() as server:
        answered, rejects = ask(
            server_run(tmp_path, gone.url, server.url),
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
