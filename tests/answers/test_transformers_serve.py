"""Answers from a server that nobody here wrote: `transformers serve` on the demo's target."""

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

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("transformers", path=str(Path(sys.executable).parent)) is None,
        reason="no `transformers` command",
    ),
]


GREEDY = "answers.sampling.temperature=0"


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
        command += [
            "--device",
            "cpu",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dtype",
            "float32",
        ]
        (self.folder / "hub").mkdir(exist_ok=True)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.folder / "hub")}
        log = (self.folder / f"{self.port}.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, env=env, start_new_session=True
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline, "the server did not come up"
            assert self.process.poll() is None, (self.folder / f"{self.port}.log").read_text()[
                -2000:
            ]
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
    rows = [
        row
        for record in artifact.records().values()
        for row in read_table(artifact.fetch_shard(record)).to_pylist()
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["turns"] for row in rows}


def same_answers(ours: dict[int, list[dict]], theirs: dict[int, list[dict]]) -> None:
    """The server takes white space off both ends of what the target said; the count of tokens
    tells that they are the same.
    """
    assert ours.keys() == theirs.keys()
    for row, turns in ours.items():
        for one, other in zip(turns, theirs[row], strict=True):
            assert one["text"].strip() == other["text"].strip()
            for field in ("num_tokens", "finish_reason", "num_prompt_tokens"):
                assert one[field] == other[field]


@pytest.fixture(scope="module")
def expected(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What the target says in this process, at temperature 0."""
    store = tmp_path_factory.mktemp("greedy") / "store"
    shutil.copytree(demo_store, store)
    config = tiny_run(store, GREEDY)
    run_prompts(Run(config))
    return turns_of(run_answers(Run(config)))


def test_two_servers_one_killed_amid_its_answers_and_started_again(
    store: Path, served: list[Served], expected: dict[int, list[dict]]
):
    """Every row once, and each as the target in this process answers it."""
    urls, name = (
        json.dumps([server.url for server in served]),
        f"resources.servers.model_name={served[0].model}",
    )
    settings = (
        "resources.servers.request_tries=20",
        "resources.servers.progress_s=0.05",
        "resources.servers.requests=2",
        "resources.servers.dialect=transformers",
    )
    config = tiny_run(
        store,
        GREEDY,
        "answers.engine=openai",
        f"resources.servers.endpoints={urls}",
        name,
        *settings,
    )
    run_prompts(Run(config))
    happened: list[str] = []

    def meddle(event: dict) -> None:
        if event["event"] == "answering" and event["rows"] >= 3 and not happened:
            served[1].kill()
            happened.append("killed")
        if event["event"] == "answering" and event["errors"] and happened == ["killed"]:
            served[1].start()
            happened.append("started")

    found = turns_of(run_answers(Run(config), report=meddle))
    assert happened == ["killed", "started"]
    same_answers(found, expected)
    served[1].wait()


def test_a_server_of_ones_own_answers_the_same(
    store: Path, expected: dict[int, list[dict]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = tiny_run(
        store,
        GREEDY,
        "answers.engine=openai",
        "resources.servers.start=transformers",
        "resources.devices.type=cpu",
    )
    run_prompts(Run(config))
    same_answers(turns_of(run_answers(Run(config))), expected)
