"""Answers from servers: every way in which a server fails, and nothing lost or doubled by any
of them.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name

import pytest

from deepspec.answers.journal import journal_path
from deepspec.answers.server_pool import PooledServer
from deepspec.answers.stage import answer_shards, run_answers
from deepspec.artifacts.missing import open_sharded
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.errors import ConfigError, ShardsFailed, TransientError
from deepspec.process.events import silent
from deepspec.prompts.stage import run_prompts
from tests.answer_server import always, answer_server
from tests.answers.asking import ask, concurrent, connect, row, server_run, stage_of
from tests.conftest import tiny_run, write_jsonl


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
def test_what_may_pass_is_tried_again(tmp_path: Path, trouble: str):
    with answer_server(lambda body, before: "answer" if before else trouble) as server:
        answered, rejects = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert (answered[0]["turns"][0]["text"], rejects, len(server.bodies)) == ("cba", [], 2)


def test_retry_after_is_honoured(tmp_path: Path):
    with answer_server(lambda body, before: "answer" if before else "429 1") as server:
        started = time.monotonic()
        ask(server_run(tmp_path, server.url), row(1, "abc"))
        assert time.monotonic() - started >= 1.0


def test_what_cannot_succeed_goes_to_the_rejects_at_once_with_the_servers_words(tmp_path: Path):
    with answer_server(always("400")) as server:
        answered, rejects = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert (answered, len(server.bodies)) == ([], 1)
    assert rejects[0]["reason"] == "http_400"
    assert "status 400" in rejects[0]["detail"]


@pytest.mark.parametrize(("setting", "kept"), [("keep", 1), ("drop", 0)])
def test_truncated_answers_are_known_as_such(tmp_path: Path, setting: str, kept: int):
    with answer_server(always("truncate")) as server:
        answered, rejects = ask(
            server_run(tmp_path, server.url, settings=(f"answers.truncated={setting}",)),
            row(1, "abc"),
        )
    assert (len(answered), len(rejects)) == (kept, 1 - kept)
    assert all(turn["finish_reason"] == "length" for found in answered for turn in found["turns"])


def test_thinking_that_the_server_took_apart_is_put_together_as_the_target_wrote_it(tmp_path: Path):
    """Trap A5."""
    with answer_server(always("reason")) as server:
        answered, _ = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["text"] == "<think>\nhm\n</think>\n\ncba"


def test_a_thought_that_the_limit_cut_off_gets_no_end_that_the_target_never_wrote(tmp_path: Path):
    with answer_server(always("cut thought")) as server:
        answered, _ = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["text"] == "<think>\nhm, so"


def test_a_server_that_counts_no_tokens_is_taken_at_its_word(tmp_path: Path):
    with answer_server(always("no counts")) as server:
        answered, _ = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["num_tokens"] == 0


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answer_server() as server:
        assert len(ask(server_run(tmp_path, server.url), row(1, "abc"))[0]) == 1


def test_a_full_disk_makes_the_stage_wait_and_costs_no_answer(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    full = iter([True, True])
    for name in (
        "deepspec.answers.answered_shard.write_table",
        "deepspec.answers.journal.Journal.append",
    ):
        real = resolve_name(
            name.replace(".answers.", ".answers:").replace(".journal.", ".journal:")
        )

        def fails_once(*args, real=real):
            if next(full, False):
                raise OSError(errno.ENOSPC, "no space left")
            return real(*args)

        monkeypatch.setattr(name, fails_once)
    with answer_server() as server:
        config = server_run(store, server.url, settings=("resources.storage.space_poll_s=0.05",))
        run_prompts(Run(config))
        assert run_answers(Run(config)).manifest() is not None
    assert next(full, None) is None and len(server.bodies) == 24


def test_a_disk_that_takes_nothing_fails_shard_after_shard_and_hangs_on_none(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    with answer_server() as server:
        config = server_run(
            store, server.url, settings=("prompts.shard_rows=1", "resources.servers.requests=1")
        )
        stage = Run(config).artifact("prompts")
        run_prompts(Run(config))

        def staged(self):
            raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(type(stage.store), "staged", staged)
        with pytest.raises(ShardsFailed, match="11 of 24 shards failed; 13 were not begun"):
            run_answers(Run(config))


def test_servers_that_were_lost_and_came_back_are_used_again(tmp_path: Path):
    """Row 1 probes; that there is no place for row 2 meanwhile must not end them both."""
    plans = ["503"]
    with answer_server(lambda body, before: plans[0]) as server:
        config = server_run(
            tmp_path,
            server.url,
            settings=("resources.servers.lost_s=0.3", "resources.servers.requests=2"),
        )
        shards = ([row(4 * n + i, "x") for i in range(4)] for n in range(30))
        with concurrent(config, stage_of(config, *shards)) as answered_shards:
            outcomes = []
            for answered in answered_shards:
                try:
                    outcomes.append(len(answered.conversations()))
                except TransientError:
                    outcomes.append(0)
                    plans[0] = "answer"
                    time.sleep(0.2)
    assert outcomes[0] == 0 and outcomes[-1] == 4


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


def test_a_row_that_makes_its_server_hang_up_is_given_up_like_any_other(tmp_path: Path):
    plan = lambda body, before: "gone" if body["messages"][-1]["content"] == "poison" else "answer"  # noqa: E731
    with answer_server(plan) as server:
        config = server_run(
            tmp_path,
            server.url,
            settings=("resources.servers.request_tries=2", "resources.servers.row_runs=1"),
        )
        with pytest.raises(TransientError, match="1 of 2 rows got no answer"):
            ask(config, row(1, "a"), row(2, "poison"))
        answered, rejects = ask(config, row(1, "a"), row(2, "poison"), keep_journal=True)
    assert (len(answered), [reject["reason"] for reject in rejects]) == (1, ["failed"])


def test_a_server_of_another_model_is_refused_before_the_first_prompt(tmp_path: Path):
    with (
        answer_server(models=("somebody-else",)) as server,
        pytest.raises(ConfigError, match="serves somebody-else, not demo"),
    ):
        connect(server_run(tmp_path, server.url))
    assert server.bodies == []


def test_a_refused_key_is_one_clear_error_and_is_nowhere_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with answer_server(key="right") as server:
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
            connect(server_run(tmp_path, server.url))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is refused") as caught:
            connect(server_run(tmp_path, server.url))
    assert "sk-secret" not in str(caught.value)


def test_the_key_is_in_nothing_that_a_run_leaves_behind(store: Path, tmp_path: Path):
    """Records, rejects, failures, journal, events and logs, of servers that take the key and of
    one that repeats it.
    """
    key, plans = "sk-secret-of-a-user", itertools.cycle(["answer", "answer", "400", "500"])
    with (
        answer_server(lambda body, before: next(plans), key=key) as server,
        answer_server(key="another") as refusing,
    ):
        said = []
        for url, shards in ((server.url, "0-2"), (refusing.url, "3-5")):
            config = server_run(store, url, settings=("resources.servers.request_tries=3",))
            run_prompts(Run(config))
            (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
            env = {
                **os.environ,
                "OPENAI_API_KEY": key,
                "DEEPSPEC_EVENTS": "1",
                "DEEPSPEC_LOG": "DEBUG",
            }
            command = [
                sys.executable,
                "-m",
                "deepspec",
                "answers",
                str(tmp_path / "run.yaml"),
                "--shards",
                shards,
            ]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            said.append(done.stdout + done.stderr)
    assert "OPENAI_API_KEY is refused" in said[1]
    left = [path for path in store.rglob("*") if path.is_file()]
    assert any("journal" in path.parts or "records" in path.parts for path in left)
    assert [path for path in left if key.encode() in path.read_bytes()] == []
    assert [words for words in said if key in words] == []


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/v1", "http://user:word@host/v1", "http://host/v1?key=x"]
)
def test_an_endpoint_that_is_none_or_holds_a_key_is_refused(tmp_path: Path, url: str):
    with pytest.raises(ConfigError, match=r"resources\.servers\.endpoints"):
        server_run(tmp_path, url)


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


def test_a_row_that_never_gets_an_answer_fails_a_few_runs_and_then_goes_to_the_rejects(
    tmp_path: Path,
):
    """Trap A2: neither lost at the first failure nor tried for ever; the other rows are asked
    once.
    """
    with answer_server(
        lambda body, before: "500" if "poison" in body["messages"][-1]["content"] else "answer"
    ) as server:
        config = server_run(
            tmp_path,
            server.url,
            settings=("resources.servers.request_tries=2", "resources.servers.row_runs=2"),
        )
        for _ in range(2):
            with pytest.raises(TransientError, match="1 of 3 rows got no answer"):
                ask(config, row(1, "a"), row(2, "poison"), row(3, "b"), keep_journal=True)
        answered, rejects = ask(
            config, row(1, "a"), row(2, "poison"), row(3, "b"), keep_journal=True
        )
    assert [found["id"] for found in answered] == [1, 3]
    assert [found["reason"] for found in rejects] == ["failed"]
    assert Counter(body["messages"][-1]["content"] for body in server.bodies) == {
        "a": 1,
        "b": 1,
        "poison": 4,
    }


def test_a_server_that_is_away_or_overloaded_is_no_fault_of_the_row(tmp_path: Path):
    """Only what a server said about the row itself is counted: an outage must not send rows to
    the rejects.
    """
    with answer_server(lambda body, before: "answer" if before > 3 else "429 0.01") as server:
        settings = ("resources.servers.request_tries=2", "resources.servers.requests=1")
        answered, rejects = ask(server_run(tmp_path, server.url, settings=settings), row(1, "abc"))
    assert (len(answered), rejects) == (1, [])


def test_once_every_server_is_lost_the_next_shards_fail_at_once(tmp_path: Path):
    """A lane of 32 shards must not wait for each of them."""
    with answer_server() as server:
        pass  # it is gone again, its port closed
    config = server_run(
        tmp_path,
        server.url,
        settings=("resources.servers.lost_s=2", "resources.servers.requests=1"),
    )
    ended = []
    with concurrent(config, stage_of(config, *([row(n, "x")] for n in range(8)))) as shards:
        for answered in shards:
            with pytest.raises(TransientError, match="no server has answered"):
                answered.conversations()
            ended.append(time.monotonic())
    assert ended[-1] - ended[0] < 1.5


def test_a_slow_conversation_does_not_keep_the_servers_from_the_next_shards(tmp_path: Path):
    """One answer of shard 0 comes after a second; the other shards are whole before, in the
    order in which they end.
    """
    with answer_server(
        lambda body, before: "slow" if body["messages"][-1]["content"] == "slow" else "answer"
    ) as server:
        config = server_run(
            tmp_path,
            server.url,
            settings=("resources.servers.request_timeout_s=10", "resources.servers.requests=4"),
        )
        shards = [[row(0, "slow")], *([row(number, "a", "b")] for number in range(1, 12))]
        with concurrent(config, stage_of(config, *shards)) as complete:
            ended = [(found.shard, len(found.conversations()[0].turns)) for found in complete]
    assert ended[-1] == (0, 1)
    assert sorted(ended[:-1]) == [(number, 2) for number in range(1, 12)]


def test_a_server_that_refuses_nearly_everything_does_not_finish_a_shard(store: Path):
    """A server pinned to a model of another name said 400 to every row, and the shard was
    committed empty.
    """
    plans = ["400"]
    with answer_server(lambda body, before: plans[0], models=()) as server:
        config = server_run(store, server.url, settings=("resources.servers.max_refused=0.2",))
        run_prompts(Run(config))
        with pytest.raises(
            ShardsFailed, match=r"4 of 4 rows were refused; the first error: .*status 400"
        ):
            run_answers(Run(config), shards=[0])
        plans[0] = "answer"
        assert run_answers(Run(config), shards=[0]).records()[0].rows == 4


def test_progress_within_a_shard_is_told_while_it_goes_on(store: Path):
    events = []
    with answer_server(latency_s=0.2) as server:
        config = server_run(
            store,
            server.url,
            settings=("resources.servers.progress_s=0.01", "resources.servers.requests=2"),
        )
        run_prompts(Run(config))
        run_answers(Run(config), report=events.append)
    told = [event for event in events if event["event"] == "answering"]
    assert any(
        0 < event["rows"] < 4 and event["in_flight"] == 2 and event["left_s"] is not None
        for event in told
    )
    assert (told[-1]["rows"], told[-1]["rows_todo"], told[-1]["tokens"], told[-1]["in_flight"]) == (
        24,
        24,
        120,
        0,
    )
    assert len(json.dumps(told[-1])) < 300


def test_of_two_workers_that_sampled_the_same_shard_the_first_ones_stands(store: Path):
    with answer_server(lambda body, before: "truncate" if before else "answer") as server:
        config = server_run(store, server.url)
        run_prompts(Run(config))
        stages = [open_sharded(Run(config), "answers", [0]) for _ in range(2)]
        for stage in stages:
            answer_shards(Run(config), stage, silent)
        (record,) = stages[1].artifact.records().values()
    assert len(server.bodies) == 8
    assert record.counts["truncated"] == 0
    assert {
        path.name
        for path in Path(stage.artifact.store.root, stage.artifact.folder, "shards").iterdir()
    } == {Path(record.file).name}


def test_a_torn_line_of_the_journal_costs_one_answer(tmp_path: Path):
    with answer_server() as server:
        config = server_run(tmp_path, server.url)
        path = journal_path(Run(config).artifact("answers"), 0)
        ask(config, row(1, "a"), row(2, "b"))
        path.write_bytes(path.read_bytes()[:-20])
        answered, _ = ask(config, row(1, "a"), row(2, "b"), keep_journal=True)
        assert (len(answered), len(server.bodies)) == (2, 3)
        ask(config, row(1, "a"), row(2, "b"), keep_journal=True)
        assert len(server.bodies) == 3


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


TROUBLES = ["500", "503", "429 0.1", "hang up", "bad json", "no choices", "truncate"]


@pytest.mark.slow
def test_2000_prompts_on_8_troubled_servers_killed_three_times_come_out_once_each(
    store: Path, tmp_path: Path
):
    """Trap A1: the reference loses 16 to 20 of 2,000 in this test and doubles as many."""
    rng = random.Random(5)

    def plan(body: dict, before: int) -> str:
        return rng.choice(TROUBLES) if rng.random() < 0.05 else "answer"

    prompts = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"prompt number {number}"} for number in range(2000)]
    )
    with ExitStack() as stack:
        servers = [stack.enter_context(answer_server(plan, latency_s=0.1)) for _ in range(8)]
        source = json.dumps({"kind": "files", "paths": [str(prompts)]})
        urls = json.dumps([server.url for server in servers])
        overrides = [
            f"prompts.source={source}",
            "prompts.limit=null",
            "prompts.shard_rows=500",
            "resources.servers.requests=8",
        ]
        overrides += ["answers.engine=openai", f"resources.servers.endpoints={urls}"]
        config = tiny_run(store, *overrides)
        run_prompts(Run(config))
        run_file = tmp_path / "run.yaml"
        run_file.write_text(json.dumps(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "deepspec", "answers", str(run_file)]
        for _ in range(3):
            asked = sum(len(server.bodies) for server in servers)
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            goal = asked + rng.randrange(150, 500)
            while child.poll() is None and sum(len(server.bodies) for server in servers) < goal:
                time.sleep(0.01)
            assert child.poll() is None
            child.send_signal(signal.SIGKILL)
            child.wait()
        artifact = run_answers(Run(config))
        asked = sum(len(server.bodies) for server in servers)
    rows = [
        found
        for record in artifact.records().values()
        for found in read_table(artifact.fetch_shard(record)).to_pylist()
    ]
    wanted = {
        json.loads(found["messages"])[0]["content"]: found["turns"][0]["text"] for found in rows
    }
    assert wanted == {
        f"prompt number {number}": f"prompt number {number}"[::-1] for number in range(2000)
    }
    assert len(rows) == 2000
    assert sum(record.rejected for record in artifact.records().values()) == 0
    assert asked < 2000 * 1.25  # troubles, and at most what was in flight at a kill, three times
    assert not list(Path(artifact.store.root, artifact.folder, "journal").glob("*"))
