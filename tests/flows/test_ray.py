"""Stages on a Ray cluster: a real one of two CPU workers, which share the store and the Prefect server with the flow, and no more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prefect import flow

from deepspec.errors import ConfigError, ShardsFailed
from deepspec.launch import Request
from deepspec.recipe import load_run
from deepspec.stages import stage_status
from flows.reporting import Progress, StageOutcome, watched_by
from flows.request import open_run
from flows.server import free_port
from flows.tasks import run_stages
from tests.conftest import REPOSITORY
from tests.flows.conftest import flaky_run

pytest.importorskip("prefect_ray")
pytestmark = pytest.mark.slow

PATIENCE_S = 120.0


@flow
def answers_on_ray(source: str, overrides: tuple[str, ...] = ()) -> list[StageOutcome]:
    return run_stages(Request(source, overrides), ("prompts", "answers"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run file of a run whose answers are made by two Ray workers of one CPU each."""
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_file = flaky_run(folder, monkeypatch)
        monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        start = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
        command = [sys.executable, "-m", "deepspec.guard", "5", sys.executable, "-m", "ray.scripts.scripts", *start]
        with (folder / "ray.log").open("wb") as log:
            head = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=log, stderr=log)
        wait_for(lambda: "Ray runtime started" in (folder / "ray.log").read_text())
        yield run_file
        head.stdin.close()
        head.wait(30)


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_it_runs(cluster: Path):
    t = time.time()
    outcomes = answers_on_ray(str(cluster), ("resources.runner=ray", "resources.lanes=2"))
    print(outcomes, time.time() - t)
    (cluster.parent / "broken").touch()
    t = time.time()
    try:
        outcomes = answers_on_ray(str(cluster), ("resources.runner=ray", "resources.lanes=2", "answers.seed=5"))
    except Exception as e:
        print(repr(e), e)
    print(time.time() - t)
