"""The README's deployment commands, with a real server and a real worker on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deepspec.stages import stage_status, stages_of
from flows.server import free_port
from tests.conftest import REPOSITORY, tiny_run
from tests.flows.conftest import QUICK


def prefect(*arguments: str, env: dict[str, str], timeout: float = 60) -> str:
    """One `prefect` command; fails the test where the command fails."""
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def running(*arguments: str, env: dict[str, str], log: Path) -> Iterator[None]:
    """`prefect server start` or `prefect worker start`, ended with everything it started when the block is left."""
    command = [sys.executable, "-m", "deepspec.guard", "5", sys.executable, "-m", "prefect", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.stdin.close()
        process.wait(30)


def wait_for_server(url: str, log: Path) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    pytest.fail(f"no server: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_server_pool_deploy_worker_and_run(store: Path, tmp_path: Path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env = kept | {
        "PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1", "PREFECT_WORKER_QUERY_SECONDS": "2", "PWD": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    server = running("server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui", env=env, log=tmp_path / "server.log")
    worker = running("worker", "start", "--pool", "deepspec-cpu", env=env, log=tmp_path / "worker.log")
    with server:
        wait_for_server(url, tmp_path / "server.log")
        prefect("work-pool", "create", "deepspec-cpu", "--type", "process", env=env)
        prefect("--no-prompt", "deploy", "--all", env=env)
        listed = prefect("deployment", "ls", env=env | {"COLUMNS": "200"})
        assert all(f"{name}/demo" in listed for name in ("pipeline", "prepare", "train", "evaluate"))
        with worker:
            parameters = ["-p", f"overrides={json.dumps(QUICK)}", "-p", f"store={store}"]
            said = prefect("deployment", "run", "pipeline/demo", "--watch", *parameters, env=env, timeout=240)
        assert "Completed" in said
        found = httpx.post(f"{url}/artifacts/latest/filter", json={}).json()
    keys = {artifact["key"] for artifact in found}
    assert {"dspark-demo-results", "dspark-demo-stages", "dspark-demo-answers", "dspark-demo-evaluate-folder"} <= keys
    config = tiny_run(store, *QUICK)
    assert all(stage_status(config, stage).sealed for stage in stages_of(config))
