"""Several shards answered by servers at once: none waits for another, and no row is lost."""

import errno
import json
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.errors import ShardsFailed, TransientError
from deepspec.prompts.stage import run_prompts
from tests.answer_server import answer_server
from tests.answers.asking import concurrent, row, server_run, stage_of
from tests.conftest import tiny_run, write_jsonl

TROUBLES = ["500", "503", "429 0.1", "hang up", "bad json", "no choices", "truncate"]


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
        run = Run(config)
        run_prompts(run)
        run.create("answers")

        def staged(self):
            raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(type(run.store), "staged", staged)
        with pytest.raises(ShardsFailed, match="11 of 24 shards failed; 13 were not begun"):
            run_answers(run)


def test_servers_that_were_lost_and_came_back_are_used_again(store: Path):
    """Row 1 probes; that there is no place for row 2 meanwhile must not end them both."""
    plans = ["503"]
    with answer_server(lambda body, before: plans[0]) as server:
        config = server_run(
            store,
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


def test_once_every_server_is_lost_the_next_shards_fail_at_once(store: Path):
    """A lane of 32 shards must not wait for each of them."""
    with answer_server() as server:
        pass  # it is gone again, its port closed
    config = server_run(
        store, server.url, settings=("resources.servers.lost_s=2", "resources.servers.requests=1")
    )
    ended = []
    with concurrent(config, stage_of(config, *([row(n, "x")] for n in range(8)))) as shards:
        for answered in shards:
            with pytest.raises(TransientError, match="no server has answered"):
                answered.conversations()
            ended.append(time.monotonic())
    assert ended[-1] - ended[0] < 1.5


def test_a_shards_answers_belong_to_it_whenever_and_however_often_they_are_read(store: Path):
    """They had to be taken exactly once, before the next shard was asked for."""
    with answer_server() as server:
        config = server_run(store, server.url)
        stage = stage_of(config, *([row(number, str(number))] for number in range(20)))
        with concurrent(config, stage) as shards:
            complete = {shard.shard: shard for shard in shards}
        for number in [7, *range(19, 0, -1), 7]:  # late, backwards, twice, and shard 0 not at all
            (conversation,) = complete[number].conversations()
            assert (conversation.row["id"], len(conversation.turns)) == (number, 1)


def test_a_slow_conversation_does_not_keep_the_servers_from_the_next_shards(store: Path):
    """One answer of shard 0 comes after a second; the other shards are whole before, in the
    order in which they end.
    """
    with answer_server(
        lambda body, before: "slow" if body["messages"][-1]["content"] == "slow" else "answer"
    ) as server:
        config = server_run(
            store,
            server.url,
            settings=("resources.servers.request_timeout_s=10", "resources.servers.requests=4"),
        )
        shards = [[row(0, "slow")], *([row(number, "a", "b")] for number in range(1, 12))]
        with concurrent(config, stage_of(config, *shards)) as complete:
            ended = [(found.shard, len(found.conversations()[0].turns)) for found in complete]
    assert ended[-1] == (0, 1)
    assert sorted(ended[:-1]) == [(number, 2) for number in range(1, 12)]


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
