"""A stage's groups as child runs on the workers of a pool: real workers, two processes that
share the store and the server.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import ShardsFailed
from deepspec.process.launch import RunRequest
from flows.reporting import StageOutcome
from flows.setup import put_pool
from flows.tasks import run_stages
from tests.conftest import REPOSITORY
from tests.flows.conftest import flaky_run
from tests.flows.test_deployment import run

POOL = "deepspec-cpu"
GATED = "answers.engine=tests.flows.engines:Gated"


class Site(NamedTuple):
    """The run file, the environment of whoever works at it, and the two workers."""

    run_file: Path
    env: dict[str, str]
    workers: list[psutil.Process]

    @property
    def notes(self) -> Path:
        return self.run_file.parent

    def lines(self, name: str) -> list[int]:
        path = self.notes / name
        return sorted(int(line) for line in path.read_text().split()) if path.exists() else []


def regenerate_on_cpu() -> dict[str, Any]:
    """The repository's prefect.yaml with one deployment of the twelve."""
    fields = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    (one,) = [
        found
        for found in fields["deployments"]
        if found["name"] == "demo" and found["entrypoint"] == "flows.pipeline.regenerate"
    ]
    return {**fields, "deployments": [one]}


def both_online() -> bool:
    with get_client(sync_client=True) as client:
        return [worker.status for worker in client.read_workers_for_work_pool(POOL)] == [
            "ONLINE"
        ] * 2


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    started = list[subprocess.Popen[bytes]]()
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_file = flaky_run(folder, monkeypatch)
        env = {
            **os.environ,
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PWD": str(REPOSITORY),
        }
        env |= {"OMP_NUM_THREADS": "1", "PREFECT_HOME": str(folder / "home")}
        with get_client(sync_client=True) as client:
            put_pool(client, POOL, None)
        (folder / "prefect.yaml").write_text(yaml.safe_dump(regenerate_on_cpu()))
        deploy = [
            sys.executable,
            "-m",
            "prefect",
            "--no-prompt",
            "deploy",
            "--all",
            "--prefect-file",
            str(folder / "prefect.yaml"),
        ]
        run(deploy, env=env, timeout=120)
        for name in ("one", "two"):
            command = [
                sys.executable,
                "-m",
                "deepspec.process.supervisor",
                "5",
                sys.executable,
                "-m",
                "prefect",
                "worker",
                "start",
            ]
            command += ["--pool", POOL, "--name", name, "--limit", "1"]
            with (folder / f"{name}.log").open("wb") as log:
                home = {"PREFECT_HOME": str(folder / name)}
                started.append(
                    subprocess.Popen(
                        command, env=env | home, stdin=subprocess.PIPE, stdout=log, stderr=log
                    )
                )
        wait_until(both_online)
        try:
            yield Site(run_file, env, [psutil.Process(process.pid) for process in started])
        finally:
            for process in started:
                process.stdin.close()
                process.wait(30)


@flow
def answers(source: str, overrides: tuple[str, ...]) -> list[StageOutcome]:
    return run_stages(RunRequest(source, overrides), ("prompts", "answers"))


def fresh(site: Site, *overrides: str) -> tuple[str, ...]:
    """Overrides for work on the pool, nothing noted so far."""
    for note in ("waits", "calls", "slow"):
        (site.notes / note).unlink(missing_ok=True)
    return ("resources.runner.kind=workers", "resources.runner.workers=demo", *overrides)


def wait_until(true: Callable[[], Any], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.1)


def states_of(*names: str) -> list[str]:
    """How the runs of these names are, oldest first."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name={"any_": list(names)}),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        )
    return [run.state.name for run in found]


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()), daemon=True)
    thread.start()
    return thread, outcome


@pytest.mark.long
def test_a_bad_shard_of_a_child_run_is_named_with_the_reason_it_left_in_the_store(site: Site):
    overrides = fresh(site, "resources.devices.lanes=1", "resources.runner.shards_per_task=6")
    (site.notes / "broken").touch()
    (site.notes / "failed-once").touch()
    with pytest.raises(
        ShardsFailed,
        match=r"1 of 6 shards of the stage 'answers' failed: "
        r"shard 5: the prompt cannot be rendered",
    ):
        answers(str(site.run_file), overrides)
    assert site.lines("calls") == [0, 1, 2, 3, 4, 5], (
        "each once, for what failed for good is not tried again"
    )
    assert stage_status(Run(load_run(str(site.run_file), overrides)), "answers").missing == [5]


@pytest.mark.long
def test_a_run_that_is_ended_ends_its_child_runs_on_the_workers(site: Site):
    overrides = fresh(site, GATED, "resources.devices.lanes=1")
    (site.notes / "slow").touch()
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "flows", "prepare", str(site.run_file), *sets]
    parent = subprocess.Popen(
        command,
        env=site.env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: site.lines("waits") == [1])
    working = [
        process
        for worker in site.workers
        for process in worker.children(recursive=True)
        if "answers" in process.cmdline()
    ]
    assert working
    parent.terminate()
    shown = parent.communicate(timeout=120)[1]
    wait_until(lambda: states_of("regenerate run.yaml 0000-0002 (part)") == ["Cancelled"])
    assert not any(process.is_running() for process in working)
    assert "Traceback" not in shown and site.lines("calls") == [0]


@pytest.mark.slow
def test_what_a_killed_worker_had_is_made_by_another_one(site: Site):
    overrides = fresh(site, GATED, "answers.max_new_tokens=7")  # an artifact of its own
    (site.notes / "slow").touch()
    thread, outcome = in_thread(lambda: answers(str(site.run_file), overrides, return_state=True))
    config = load_run(str(site.run_file), overrides)
    # A shard is committed beside the making of the next one: what is only on its way there is lost
    # with its worker.
    wait_until(
        lambda: (
            site.lines("waits") == [1, 4]
            and stage_status(Run(config), "answers").missing == [1, 2, 4, 5]
        )
    )
    for process in [site.workers[0], *site.workers[0].children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    (site.notes / "slow").unlink()
    thread.join(180)
    assert outcome and outcome[0].is_completed(), outcome
    assert site.lines("calls") == [0, 1, 2, 3, 4, 5], "each once"
    assert stage_status(Run(config), "answers").sealed
    assert (
        states_of(
            "regenerate run.yaml 0000-0002 (part)", "regenerate run.yaml 0003-0004 (part)"
        ).count("Crashed")
        == 1
    )
