"""Answers from a server that nobody here wrote: `transformers serve` on the demo's target."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deepspec.data.answers import run_answers
from deepspec.data.prompts import run_prompts
from deepspec.data.tables import read_table
from tests.conftest import tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("transformers", path=str(Path(sys.executable).parent)) is None, reason="no `transformers` command"),
]


class Served:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        command = [str(Path(sys.executable).parent / "transformers"), "serve", str(self.model)]
        command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        (self.folder / "hub").mkdir(exist_ok=True)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.folder / "hub")}
        log = (self.folder / f"{self.port}.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def wait(self) -> None:
        deadline = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline, "the server did not come up"
            assert self.process.poll() is None, (self.folder / f"{self.port}.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    (model,) = demo_store.glob("demo/*/target")
    folder = tmp_path_factory.mktemp("serve")
    servers = [Served(model, folder) for _ in range(2)]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


def turns_of(artifact) -> dict[int, list[dict]]:
    rows = [row for record in artifact.records().values() for row in read_table(artifact.fetch_shard(record)).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["turns"] for row in rows}


def test_at_temperature_0_a_server_answers_as_the_target_in_this_process_and_a_killed_one_loses_nothing(store: Path, served: list[Served]):
    greedy = "answers.sampling.temperature=0"
    config = tiny_run(store, greedy)
    run_prompts(config)
    expected = turns_of(run_answers(config))
    urls = json.dumps([server.url for server in served])
    name = f"resources.served_model={served[0].model}"
    pool = tiny_run(store, greedy, "answers.engine=openai", f"resources.endpoints={urls}", name, "resources.request_tries=20")
    shards = sorted(run_prompts(pool).records())
    run_answers(pool, shards=shards[:2])
    served[1].kill()
    run_answers(pool, shards=shards[2:4])
    served[1].start()
    served[1].wait()
    found = turns_of(run_answers(pool))
    assert found.keys() == expected.keys()
    for row, turns in expected.items():
        for ours, theirs in zip(turns, found[row], strict=True):
            # The server takes white space off both ends of what the target said; the count of tokens tells that they are the same.
            assert (ours["text"].strip(), ours["num_tokens"]) == (theirs["text"].strip(), theirs["num_tokens"])
            assert ours["finish_reason"] == theirs["finish_reason"]
            assert ours["num_prompt_tokens"] == theirs["num_prompt_tokens"]
