"""The README's deployment commands, with a real server and a real worker on loopback.

Wrong parameters are refused before a run is made, a run of some shards makes only these, and a webhook hears how runs ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from deepspec.errors import ConfigError, UserError
from deepspec.launch import Request
from deepspec.recipe import load_run
from deepspec.stages import stage_status, stages_of
from flows.automations import FLOWS
from flows.selection import selected
from flows.server import free_port
from flows.setup import check_version
from tests.conftest import REPOSITORY, tiny_run
from tests.flows.conftest import QUICK, flaky_run


def readme_command(start: str) -> list[str]:
    """The command of the README's section on deployments that starts like this, for the Python that runs the tests."""
    section = (REPOSITORY / "README.md").read_text().split("## Deployments\n")[1]
    lines = [shlex.split(line, comments=True) for line in section.split("```")[1].splitlines()]
    (found,) = [line for line in lines if shlex.join(line).startswith(start)]
    return [sys.executable, *(found[1:] if found[0] == "python" else ["-m", *found])]


def run(command: list[str], *, env: dict[str, str], code: int = 0, timeout: float = 60) -> str:
    """What the command says; fails the test where it ends with another code."""
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def running(command: list[str], *, env: dict[str, str], log: Path) -> Iterator[None]:
    """`prefect server start` or `prefect worker start`, ended with everything it started when the block is left."""
    command = [sys.executable, "-m", "deepspec.guard", "5", *command]
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


class Site(NamedTuple):
    """A server that was set up by the README's command, a worker, and what the webhook has heard."""

    url: str
    env: dict[str, str]
    run_file: Path
    heard: list[str]

    def deployment_run(self, name: str, *, code: int = 0, **parameters: object) -> str:
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in parameters.items()]
        asked = [word for parameter in words for word in ("-p", parameter)]
        command = [*readme_command("prefect deployment run"), *asked]
        return run([name if word == "pipeline/demo" else word for word in command], env=self.env, code=code, timeout=240)

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=30)

    def deployment(self, name: str) -> dict[str, object]:
        return httpx.get(f"{self.url}/deployments/name/{name}", timeout=30).json()


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[str]]]:
    heard: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", heard
    server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, port = tmp_path_factory.mktemp("site"), free_port()
    url = f"http://127.0.0.1:{port}/api"
    with pytest.MonkeyPatch.context() as monkeypatch, webhook() as (hook, heard):
        run_file = flaky_run(folder, monkeypatch)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        env = kept | {
            "PREFECT_API_URL": url, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1", "PREFECT_WORKER_QUERY_SECONDS": "2", "PWD": str(REPOSITORY), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        server = [*readme_command("prefect server start"), "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
        worker = readme_command("prefect worker start --pool deepspec-cpu")
        with running(server, env=env, log=folder / "server.log"):
            wait_for_server(url, folder / "server.log")
            run([*readme_command("python -m flows.setup"), "--notify", hook], env=env)
            with running(worker, env=env, log=folder / "worker.log"):
                yield Site(url, env, run_file, heard)


def test_setup_can_be_run_again(site: Site):
    before = site.post("deployments/filter").json()
    assert {(found["name"], found["entrypoint"]) for found in before} == {
        (name, f"flows.{flow}.{flow}") for flow in FLOWS for name in ("demo", "gpu")
    }
    said = run([*readme_command("python -m flows.setup"), "--gpu-runs", "3"], env=site.env)
    assert said.count("up to date") == 6 and "secret-path" not in said
    assert "no worker on the work pool 'deepspec-gpu' yet: start one with" in said and "'deepspec-cpu' yet" not in said
    assert {found["id"] for found in site.post("deployments/filter").json()} == {found["id"] for found in before}
    automations = {found["name"]: found for found in site.post("automations/filter").json()}
    assert len(automations) == 4 and len(site.post("automations/filter").json()) == 4
    assert automations["deepspec: mark runs crashed that died without a word"]["trigger"]["within"] == 540
    pools = {pool["name"]: pool for pool in site.post("work_pools/filter").json()}
    assert pools["deepspec-gpu"]["concurrency_limit"] == 3 and pools["deepspec-cpu"]["concurrency_limit"] is None
    for pool in ("deepspec-cpu", "deepspec-gpu"):
        assert pools[pool]["base_job_template"]["variables"]["properties"]["stream_output"]["default"] is False


def test_a_wrong_parameter_is_refused_before_a_run_is_made(site: Site):
    found = site.deployment("regenerate/demo")
    for parameters, said in [
        ({"shards": "17-"}, "shards"),
        ({"shards": "a"}, "shards"),
        ({"shards": -1}, "shards"),
        ({"recipe": "dspark-demmo"}, "recipe"),
        ({"overrides": ["train.lr"]}, "overrides"),
    ]:
        refused = site.post(f"deployments/{found['id']}/create_flow_run", parameters=parameters)
        assert refused.is_client_error and said in refused.text, parameters
    said = " ".join(site.deployment_run("regenerate/demo", code=1, shards="17-").split())
    assert "Validation failed for field 'shards'. Failure reason: '17-' does not match" in said
    assert site.post("flow_runs/filter", deployments={"id": {"any_": [found["id"]]}}).json() == []


def test_the_form_has_defaults_choices_and_descriptions(site: Site):
    fields = site.deployment("capture/demo")["parameter_openapi_schema"]["properties"]
    assert list(fields) == ["recipe", "overrides", "shards", "store"]
    assert all(field["description"] and "default" in field for field in fields.values())
    assert {"demo", "dspark-qwen3-4b"} <= set(fields["recipe"]["examples"])


@pytest.mark.slow
def test_a_run_of_some_shards_makes_only_these_and_the_webhook_hears_of_it(site: Site):
    run(Request(str(site.run_file)).command("prompts"), env=site.env)
    recipe, config = str(site.run_file), load_run(str(site.run_file))
    assert "Completed" in site.deployment_run("regenerate/demo", recipe=recipe, shards="1,4-5")
    assert stage_status(config, "answers").missing == [0, 2, 3]
    site.deployment_run("regenerate/demo", code=1, recipe=recipe, shards=17)
    (failed_run,) = site.post("flow_runs/filter", flow_runs={"name": {"any_": ["regenerate run.yaml 17"]}}).json()
    assert "ConfigError: the stage 'answers' has no shard 17; there are 0 to 5" in failed_run["state"]["message"]
    assert stage_status(config, "answers").missing == [0, 2, 3]
    limit = time.monotonic() + 30
    while len(site.heard) < 2 and time.monotonic() < limit:
        time.sleep(0.2)
    done, failed = sorted(site.heard)
    assert done.startswith("regenerate run.yaml 1,4-5: Completed http") and failed.startswith("regenerate run.yaml 17: Failed http")


@pytest.mark.slow
def test_server_setup_worker_and_run(site: Site, store: Path):
    said = site.deployment_run("pipeline/demo", overrides=QUICK, store=str(store))
    assert "Completed" in said
    found = site.post("artifacts/latest/filter").json()
    keys = {artifact["key"] for artifact in found}
    assert {"dspark-demo-results", "dspark-demo-stages", "dspark-demo-answers", "dspark-demo-evaluate-folder"} <= keys
    config = tiny_run(store, *QUICK)
    assert all(stage_status(config, stage).sealed for stage in stages_of(config))
    status = stage_status(config, "evaluate")
    with pytest.raises(ConfigError, match="the stage 'evaluate' has no shard 99; there are 0 to "):
        selected(config, status, [99])
    Path(status.artifact_url, "records", "00001.json").unlink()
    assert selected(config, stage_status(config, "evaluate"), [0, 1]).missing == [1]


def test_a_server_of_another_version_is_refused():
    check_version("3.8.8")
    check_version("3.10.0+5.gabc")
    for other in ("2.20.4", "3.7.9", "4.0.0"):
        with pytest.raises(UserError, match=r"does not fit: 3\.8 or a later 3\.x"):
            check_version(other)
