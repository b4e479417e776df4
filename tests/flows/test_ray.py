"""Stages on a Ray cluster: a real one of two CPU workers, which share the store and the Prefect
server with the flow, and no more.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL

from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.config.resources import ResourcesConfig, RunnerConfig
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError, ShardsFailed, UserError
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import Progress
from deepspec.prompts.stage import run_prompts
from flows.reporting import StageOutcome, watched_by
from flows.request import checked_run
from flows.server import free_port
from flows.tasks import run_stages
from tests.answer_server import answer_server
from tests.conftest import REPOSITORY
from tests.flows.conftest import flaky_run
from tests.flows.machines import accept_interrupts
from tests.processes import is_alive

if find_spec("prefect_ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)
from flows.ray_cluster import ON_LOOPBACK, connected

PATIENCE_S = 120.0
ON_RAY = ("resources.runner.kind=ray", "resources.devices.lanes=2")
SLOW = "answers.engine=tests.flows.engines:Slow"


@flow
def answers(source: str, overrides: tuple[str, ...] = ()) -> list[StageOutcome]:
    return run_stages(RunRequest(source, (*ON_RAY, *overrides)), ("answers",))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run file of a run whose answers are made by two Ray workers of one CPU each."""
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_file = flaky_run(folder, monkeypatch)
        run_prompts(Run(load_run(str(run_file))))
        assert "ray" not in sys.modules, "it would not know that it is to stay on loopback"
        for name, value in {
            **ON_LOOPBACK,
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": f"127.0.0.1:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        options = [
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=2",
            "--include-dashboard=false",
            "--disable-usage-stats",
        ]
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        head = started(start, folder / "ray.log")
        try:
            yield run_file
        finally:
            head.stdin.close()
            head.wait(30)


def started(command: list[str], log: Path, tries: int = 3) -> subprocess.Popen[bytes]:
    """A cluster that is up; Ray gives its own processes 30 seconds, which are too few on a
    machine that is busy with other tests.
    """
    with log.open("wb") as output:
        head = subprocess.Popen(
            [sys.executable, "-m", "deepspec.process.supervisor", "5", *command],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    wait_for(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None)
    if head.poll() is None:
        return head
    assert tries > 1, log.read_text()[-2000:]
    return started(command, log, tries - 1)


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def config_of(run_file: Path, *overrides: str) -> RunConfig:
    return load_run(str(run_file), overrides)


def committed(config: RunConfig) -> list[int]:
    return Run(config).artifact("answers").record_shards()


def children_for(run_file: Path) -> list[psutil.Process]:
    """Guards and what they guard: whatever works on answers of this run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if {"answers", str(run_file)} <= set(process.cmdline()):
                found.append(process)
    return found


def alive_after(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run by then."""
    limit = time.monotonic() + seconds
    while (
        alive := [process for process in processes if is_alive(process)]
    ) and time.monotonic() < limit:
        time.sleep(0.1)
    return alive


def ray_worker_of(run_file: Path, shards: str) -> psutil.Process:
    (guard,) = [
        child
        for child in children_for(run_file)
        if shards in child.cmdline() and "deepspec.process.supervisor" in child.cmdline()
    ]
    worker = guard.parent()
    assert worker is not None and worker.name().startswith("ray::")
    return worker


@pytest.mark.slow
def test_a_killed_workers_shards_go_to_the_others_and_none_is_lost_or_made_twice(
    cluster: Path, caplog: pytest.LogCaptureFixture
):
    config, slow = config_of(cluster, SLOW), cluster.parent / "slow"
    slow.touch()
    seen: list[Progress] = []
    found: list[tuple[bool, bytes]] = []
    record = Path(Run(config).artifact("answers").url, "records", "00000.json")

    def kill() -> None:
        wait_for(lambda: committed(config) == [0] and len(children_for(cluster)) == 4)
        worker, first = ray_worker_of(cluster, "0-2"), record.read_bytes()
        worker.kill()
        gone = psutil.wait_procs([worker], PATIENCE_S)[1] == []
        wait_for(lambda: not any("0-2" in child.cmdline() for child in children_for(cluster)))
        found.append((gone, first))
        slow.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    with watched_by(seen.append):
        (outcome,) = answers(str(cluster), (SLOW,))
    killer.join()
    assert found == [(True, record.read_bytes())]
    assert outcome.status.sealed and outcome.status.committed == 6
    assert seen[-1].done == 6 and seen[-1].numbers["rows"] == 12
    assert "the Ray worker that did answers 0000-0002 is gone" in caplog.text


@pytest.mark.long
def test_a_failed_shards_reason_comes_back_and_the_next_run_does_it_alone(cluster: Path):
    calls = cluster.parent / "calls"
    (cluster.parent / "broken").touch()
    with pytest.raises(ShardsFailed) as caught:
        answers(str(cluster))
    assert (
        "1 of 6 shards of the stage 'answers' failed: shard 5: the prompt cannot be rendered"
        in str(caught.value)
    )
    assert caught.value.failures[5]["error"] == "DataError"
    assert sorted(calls.read_text().split()) == ["0", "1", "2", "3", "3", "4", "5"], (
        "shard 3 twice: it was busy once"
    )
    calls.unlink()
    (cluster.parent / "broken").unlink()
    (outcome,) = answers(str(cluster))
    assert outcome.status.sealed and calls.read_text().split() == ["5"]


@pytest.mark.long
def test_an_error_that_ends_a_child_is_raised_as_its_own_class(cluster: Path):
    with pytest.raises(ConfigError, match="the engine cannot be imported"):
        answers(str(cluster), ("answers.engine=tests.engines:Nobody",))


@pytest.mark.long
def test_the_servers_key_is_read_by_the_ray_worker_from_its_block(
    cluster: Path, caplog: pytest.LogCaptureFixture
):
    key = "sk-for-a-ray-worker"
    Secret(value=key).save("ray-servers-key", overwrite=True)
    with answer_server(models=(), key=key) as server:
        ask = (
            "answers.engine=openai",
            f'resources.servers.endpoints=["{server.url}"]',
            "resources.servers.api_key_secret=ray-servers-key",
        )
        (outcome,) = answers(str(cluster), ask)
    assert outcome.status.sealed and len(server.bodies) == 12
    assert [
        path
        for path in cluster.parent.rglob("*")
        if path.is_file() and key.encode() in path.read_bytes()
    ] == []
    assert key not in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(("where", "number"), [("cluster", signal.SIGTERM), ("own", signal.SIGINT)])
def test_a_flow_that_is_ended_ends_the_children_of_its_ray_workers(
    cluster: Path, where: str, number: int
):
    """A Ray of the flow's own listens on loopback alone, and ends with it, too."""
    config = config_of(cluster, SLOW, f"answers.seed={number}")
    (cluster.parent / "slow").touch()
    sets = [
        word
        for override in (*ON_RAY, SLOW, f"answers.seed={number}")
        for word in ("--set", override)
    ]
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    if where == "own":
        env = {name: value for name, value in env.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "flows", "regenerate", str(cluster), *sets]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=env, preexec_fn=accept_interrupts
    ) as running:
        wait_for(lambda: committed(config) == [0] and len(children_for(cluster)) == 4)
        children, below = (
            children_for(cluster),
            psutil.Process(running.pid).children(recursive=True),
        )
        if where == "own":
            received = [
                connection.laddr.ip
                for process in below
                for connection in process.net_connections()
                if connection.status == "LISTEN"
            ]
            assert received and {ip.removeprefix("::ffff:") for ip in received} == {"127.0.0.1"}
        worker = ray_worker_of(cluster, "0-2")
        running.send_signal(number)
        assert alive_after(15, children) == []
        running.wait(60)
    assert alive_after(15, [worker, *below]) == []
    assert committed(config) == [0]


@pytest.mark.long
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there_is_said_at_once(address: str):
    with (
        pytest.raises(UserError, match=r"Ray cannot be reached: .*") as caught,
        connected(ResourcesConfig(runner=RunnerConfig(ray_address=address))),
    ):
        pass
    assert caught.value.where == address


@pytest.mark.long
def test_a_run_on_ray_is_refused_where_it_is_not_installed(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(ConfigError, match="needs prefect_ray, not installed here"):
        checked_run(RunRequest(str(run_file), ("resources.runner.kind=ray",)))
