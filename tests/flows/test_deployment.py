"""The README's deployment commands, with a real server and a real worker on loopback.

Wrong parameters are refused before a run is made, a run of some shards makes only these, and a
webhook is called when runs ended.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, temporary_settings

from deepspec import __version__
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import selected, stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError, UserError
from deepspec.process.launch import RunRequest
from flows.assets import asset_key
from flows.automations import crashed
from flows.compatible import check_version
from flows.parameters import KEY_IN_OVERRIDE, KEY_IN_STORE
from flows.pipeline import FLOWS, pipeline
from flows.server import free_port
from tests.answer_server import answer_server
from tests.conftest import REPOSITORY, tiny_run
from tests.flows.browser import CHROMIUM, browser
from tests.flows.conftest import QUICK, flaky_run, home_with
from tests.flows.test_assets import chain_in_store, chain_on_server
from tests.radosgw import SECRET_KEY, Radosgw, ceph_missing


def readme_section() -> tuple[dict[str, str], list[list[str]]]:
    """The README's block on deployments: what it exports, and its commands for the Python that
    runs the tests, in order.
    """
    section = (REPOSITORY / "README.md").read_text().split("## Deployments\n")[1]
    lines = [
        shlex.split(line, comments=True) for line in section.split("```")[1].splitlines() if line
    ]
    exports = dict(word.split("=", 1) for line in lines if line[0] == "export" for word in line[1:])
    commands = [line for line in lines if line[0] != "export"]
    return exports, [
        [sys.executable, *(line[1:] if line[0] == "python" else ["-m", *line])] for line in commands
    ]


# fails where a line more or less is there
EXPORTS, (SERVER, SETUP, WORKER, RUN) = readme_section()


def run(command: list[str], *, env: dict[str, str], code: int = 0, timeout: float = 240) -> str:
    """The command's output; fails the test where it ends with another code."""
    done = subprocess.run(
        command,
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def running(command: list[str], *, env: dict[str, str], log: Path) -> Iterator[None]:
    """`prefect server start` or `prefect worker start`, ended with everything it started when
    the block is left.
    """
    command = [sys.executable, "-m", "deepspec.process.supervisor", "5", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
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


KEY_VARIABLE, KEY_IN_ENVIRONMENT, KEY_IN_BLOCK = (
    "SERVERS_KEY",
    "sk-in-the-workers-environment",
    "sk-in-a-prefect-block",
)
HOOK_TOKEN = "secret-path"


class Site(NamedTuple):
    """A server that was set up by the README's command, a worker, and what the webhook has
    received.
    """

    url: str
    env: dict[str, str]
    run_file: Path
    received: list[str]

    def deployment_run(
        self, name: str, *, code: int = 0, timeout: float = 240, **parameters: object
    ) -> str:
        words = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in parameters.items()
        ]
        options = [word for parameter in words for word in ("-p", parameter)]
        command = [*RUN, *options]
        return run(
            [name if word == "pipeline/demo" else word for word in command],
            env=self.env,
            code=code,
            timeout=timeout,
        )

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=30)

    def artifact(self, key: str) -> dict[str, str]:
        """The newest of this key."""
        wanted = {"key": {"any_": [key]}}
        return self.post("artifacts/filter", artifacts=wanted, sort="CREATED_DESC", limit=1).json()[
            0
        ]

    def page(self, artifact: dict[str, str]) -> str:
        return f"{self.url.removesuffix('/api')}/artifacts/artifact/{artifact['id']}"

    def state(self, run: str) -> str:
        return str(httpx.get(f"{self.url}/flow_runs/{run}", timeout=30).json()["state"]["type"])

    def deployment(self, name: str) -> dict[str, object]:
        return httpx.get(f"{self.url}/deployments/name/{name}", timeout=30).json()


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[str]]]:
    received: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(
                json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{HOOK_TOKEN}", received
    server.shutdown()


def s3_variables(request: pytest.FixtureRequest) -> dict[str, str]:
    """Keys of a real S3 server in the workers' environment, where one can be started."""
    if ceph_missing():
        return {}
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/dev/null")
    return {**request.getfixturevalue("radosgw").variables(), **nowhere}


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    home_with(database, folder / "prefect")
    with opened_site(folder, s3_variables(request)) as opened:
        yield opened


@contextlib.contextmanager
def opened_site(folder: Path, s3: Mapping[str, str]) -> Iterator[Site]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with pytest.MonkeyPatch.context() as monkeypatch, webhook() as (hook, received):
        run_file = flaky_run(folder, monkeypatch)
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
        }
        env = (
            kept
            | s3
            | EXPORTS
            | {
                KEY_VARIABLE: KEY_IN_ENVIRONMENT,
                "PREFECT_API_URL": url,
                "PREFECT_HOME": str(folder / "prefect"),
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "DO_NOT_TRACK": "1",
                "PREFECT_WORKER_QUERY_SECONDS": "2",
                "PWD": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
            }
        )
        server = [*SERVER, "--host", "127.0.0.1", "--port", str(port)]
        with running(server, env=env, log=folder / "server.log"):
            wait_for_server(url, folder / "server.log")
            run([*SETUP, "--notify", hook], env=env)
            with running(WORKER, env=env, log=folder / "worker.log"):
                yield Site(url, env, run_file, received)


@pytest.mark.slow
def test_setup_can_be_run_again(site: Site):
    before = site.post("deployments/filter").json()
    assert {(found["name"], found["entrypoint"]) for found in before} == {
        (name, f"flows.pipeline.{flow.fn.__name__}")
        for flow in FLOWS.values()
        for name in ("demo", "gpu")
    }
    assert {found["version"] for found in before} == {__version__}
    shown = run([*SETUP, "--gpu-runs", "3"], env=site.env)
    assert shown.count("up to date") == 6 and HOOK_TOKEN not in shown
    assert (
        "no worker on the work pool 'deepspec-gpu' yet: start one with" in shown
        and "'deepspec-cpu' yet" not in shown
    )
    assert {found["id"] for found in site.post("deployments/filter").json()} == {
        found["id"] for found in before
    }
    automations = {found["name"]: found for found in site.post("automations/filter").json()}
    assert len(automations) == 4 and len(site.post("automations/filter").json()) == 4
    assert (
        automations["deepspec: mark runs crashed that died without a word"]["trigger"]["within"]
        == 540
    )
    pools = {pool["name"]: pool for pool in site.post("work_pools/filter").json()}
    assert (
        pools["deepspec-gpu"]["concurrency_limit"] == 3
        and pools["deepspec-cpu"]["concurrency_limit"] is None
    )
    for pool in ("deepspec-cpu", "deepspec-gpu"):
        assert (
            pools[pool]["base_job_template"]["variables"]["properties"]["stream_output"]["default"]
            is False
        )


@pytest.mark.slow
def test_a_wrong_parameter_is_refused_before_a_run_is_made(site: Site):
    found = site.deployment("regenerate/demo")
    for parameters, shown in [
        ({"shards": "17-"}, "shards"),
        ({"shards": "a"}, "shards"),
        ({"shards": -1}, "shards"),
        ({"recipe": "dspark-demmo"}, "recipe"),
        ({"overrides": ["train.lr"]}, "overrides"),
        # A run keeps its parameters, so keys must not get that far.
        ({"store": "s3://AKIAKEY:with/slash@bucket/x"}, "store"),
        ({"store": "s3://AKIAKEY@bucket"}, "store"),
        ({"overrides": ["store=s3://AKIAKEY:word@bucket"]}, "overrides"),
        ({"overrides": ['resources.servers.endpoints=["http://user:word@host/v1"]']}, "overrides"),
        ({"overrides": ["resources.api_key=sk-word"]}, "overrides"),
        ({"overrides": ["resources.servers.api_key=sk-word"]}, "overrides"),
        ({"overrides": ["resources.servers.api_key_env=sk-word"]}, "overrides"),
    ]:
        refused = site.post(f"deployments/{found['id']}/create_flow_run", parameters=parameters)
        assert refused.is_client_error and shown in refused.text, parameters
    shown = " ".join(site.deployment_run("regenerate/demo", code=1, shards="17-").split())
    assert "Validation failed for field 'shards'. Failure reason: '17-' does not match" in shown
    shown = " ".join(
        site.deployment_run("regenerate/demo", code=1, store="s3://AKIAKEY:word@bucket").split()
    )
    assert "Validation failed for field 'store'" in shown and "should not be valid under" in shown
    assert site.post("flow_runs/filter", deployments={"id": {"any_": [found["id"]]}}).json() == []


def test_no_pattern_refuses_what_holds_no_key():
    for store in (
        "",
        "store",
        "/data/a:b@c",
        "s3://bucket/a:b/c@d",
        "file:///data/x@y",
        "memory://name",
    ):
        assert not re.search(KEY_IN_STORE, store), store
    for override in (
        "train.lr=3e-4",
        "store=s3://bucket/x@y",
        'resources.servers.endpoints=["http://host:8000/v1", "http://other/v1"]',
        "resources.servers.api_key_env=OPENAI_API_KEY",
        "resources.servers.api_key_secret=servers-key",
        "prompts.source={kind: files, paths: [hf://datasets/a/b@main/c.jsonl]}",
    ):
        assert not re.search(KEY_IN_OVERRIDE, override), override


@pytest.mark.slow
def test_the_form_has_defaults_choices_and_descriptions(site: Site):
    fields = site.deployment("capture/demo")["parameter_openapi_schema"]["properties"]
    assert list(fields) == ["recipe", "overrides", "shards", "store"]
    assert all(field["description"] and "default" in field for field in fields.values())
    assert {"demo", "dspark-qwen3-4b"} <= set(fields["recipe"]["examples"])


@pytest.mark.long
def test_a_run_of_some_shards_makes_only_these_and_the_webhook_hears_of_it(site: Site):
    run(RunRequest(str(site.run_file)).command("prompts"), env=site.env)
    recipe, config = str(site.run_file), load_run(str(site.run_file))
    assert "Completed" in site.deployment_run("regenerate/demo", recipe=recipe, shards="1,4-5")
    assert stage_status(Run(config), "answers").missing == [0, 2, 3]
    shown = site.deployment_run("regenerate/demo", code=1, recipe=recipe, shards=17)
    assert (
        "the stage 'answers' has no shard 17; there are 0 to 5" in shown
        and "Traceback" not in shown
    ), "on the terminal, too"
    (failed_run,) = site.post(
        "flow_runs/filter", flow_runs={"name": {"any_": ["regenerate run.yaml 0017"]}}
    ).json()
    assert (
        "ConfigError: the stage 'answers' has no shard 17; there are 0 to 5"
        in failed_run["state"]["message"]
    )
    assert stage_status(Run(config), "answers").missing == [0, 2, 3]
    limit = time.monotonic() + 30
    while len(set(site.received)) < 2 and time.monotonic() < limit:
        time.sleep(0.2)
    done, failed = sorted(set(site.received))  # Prefect may send a message twice
    assert done.startswith(
        "regenerate run.yaml 0001,0004-0005: Completed http"
    ) and failed.startswith("regenerate run.yaml 0017: Failed http")


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: `apt-get install chromium`")
def test_the_page_of_a_failed_run_shows_its_shards_and_a_command_that_makes_them(
    site: Site, tmp_path: Path
):
    run(RunRequest(str(site.run_file)).command("prompts"), env=site.env)
    # answers of its own, whatever other tests made
    recipe, changed = str(site.run_file), ("answers.max_new_tokens=33",)
    (site.run_file.parent / "broken").touch()
    site.deployment_run(
        "regenerate/demo", code=1, recipe=recipe, overrides=list(changed), shards="3-5"
    )
    (site.run_file.parent / "broken").unlink()
    failure, lanes, picture = (
        site.artifact(f"flaky-{name}")
        for name in ("failure", "answers-lanes", "answers-throughput")
    )
    with browser(tmp_path / "profile") as page:
        page.open(
            f"{site.url.removesuffix('/api')}/runs/flow-run/{failure['flow_run_id']}",
            "regenerate run.yaml 0003-0005",
            "Failed",
        )
        page.click("Artifacts")
        page.wait_for(
            "flaky-failure",
            "flaky-answers",
            "flaky-answers-lanes",
            "flaky-answers-throughput",
            "flaky-stages",
        )
        page.open(
            site.page(failure),
            "may another try help?",
            "the prompt cannot be rendered",
            "no, not as it is",
        )
        commands = page.ask("[...document.querySelectorAll('pre')].map(it => it.innerText.trim())")
        page.open(site.page(lanes), "lane #0", "shards/min")
        page.open(site.page(picture), "answers: throughput")
        page.wait(
            "[...document.images].some(it => it.src.startsWith('data:image/svg')"
            " && it.naturalWidth > 300 && it.height > 100)"
        )
        # Prefect's own, which its server does not have
        icons = re.compile(r"status of 404 .*\.(ico|svg)$")
        assert [shown for shown in page.complaints if not icons.search(shown.strip())] == []
    config = load_run(recipe, changed)
    assert stage_status(Run(config), "answers").missing == [0, 1, 2, 5]
    by_worker, here, again = map(shlex.split, commands)
    assert here[:4] == ["python", "-m", "deepspec", "answers"] and "shards=3-5" in again
    run([sys.executable, "-m", *by_worker, "--watch"], env=site.env, timeout=240)
    assert stage_status(Run(config), "answers").missing == [0, 1, 2]


@pytest.mark.slow
def test_server_setup_worker_and_run(site: Site, store: Path):
    shown = site.deployment_run("pipeline/demo", overrides=QUICK, store=str(store))
    assert "Completed" in shown
    found = site.post("artifacts/latest/filter").json()
    keys = {artifact["key"] for artifact in found}
    assert "report.html" in site.artifact("dspark-demo-report")["data"]
    assert "acceptance length" in site.artifact("dspark-demo-benchmarks")["data"]
    assert "data:image/svg+xml;base64," in site.artifact("dspark-demo-train-curves")["data"]
    assert {
        "dspark-demo-results",
        "dspark-demo-stages",
        "dspark-demo-answers",
        "dspark-demo-evaluate-folder",
    } <= keys
    config = tiny_run(store, *QUICK)
    assert all(
        stage_status(Run(config), stage).sealed
        for stage in [stage.name for stage in Run(config).stages]
    )
    result = Run(config).artifact("evaluate")
    with temporary_settings({PREFECT_API_URL: site.url}):
        assert chain_on_server(asset_key(result.url)) == chain_in_store(result)
    # at the tests' own server, which knows nothing of it
    pipeline(recipe="demo", overrides=tuple(QUICK), store=str(store))
    assert chain_on_server(asset_key(result.url)) == chain_in_store(result)
    status = stage_status(Run(config), "evaluate")
    with pytest.raises(ConfigError, match="the stage 'evaluate' has no shard 99; there are 0 to "):
        selected(Run(config), status, [99])
    Path(status.artifact_url, "records", "00001.json").unlink()
    assert selected(Run(config), stage_status(Run(config), "evaluate"), [0, 1]).missing == [1]


SILENCE_S = 20.0  # Prefect takes no less than ten, and looks every five


@pytest.mark.long
def test_a_run_that_falls_silent_is_marked_crashed_and_one_that_goes_on_is_not(site: Site):
    """Setup refuses so short an interval; with it the same automation is seen to work within
    the test's time.
    """
    short = crashed(SILENCE_S).model_dump(mode="json") | {"name": "short"}
    made = site.post("automations/", **short).json()
    flow = site.post("flows/", name="regenerate").json()["id"]
    silent, healthy = (
        site.post("flow_runs/", flow_id=flow, state={"type": "RUNNING"}).json()["id"]
        for _ in range(2)
    )
    began = time.monotonic()
    heartbeat(site, flow, silent)
    while site.state(silent) == "RUNNING" and time.monotonic() < began + 120:
        heartbeat(site, flow, healthy)
        time.sleep(1.0)
    assert time.monotonic() > began + SILENCE_S, (
        "the healthy one was watched for as long as the silent one was silent"
    )
    assert (site.state(silent), site.state(healthy)) == ("CRASHED", "RUNNING")
    httpx.delete(f"{site.url}/automations/{made['id']}", timeout=30).raise_for_status()


def heartbeat(site: Site, flow: str, run: str) -> None:
    """As Prefect's flow engine sends it."""
    event = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [
            {
                "prefect.resource.id": f"prefect.flow.{flow}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": "regenerate",
            }
        ],
    }
    httpx.post(f"{site.url}/events", json=[event], timeout=30).raise_for_status()


def test_a_server_of_another_version_is_refused():
    check_version("3.8.8")
    check_version("3.10.0+5.gabc")
    for other in ("2.20.4", "3.7.9", "4.0.0"):
        with pytest.raises(UserError, match=r"does not fit: 3\.8 or a later 3\.x"):
            check_version(other)


@pytest.mark.long
def test_no_key_is_in_anything_that_a_run_leaves_behind(
    site: Site, radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch
):
    """S3 keys and one API key in the worker's environment, another in a Prefect block, a
    webhook's token: each was used.
    """
    for name, value in s3_keys(site).items():
        monkeypatch.setenv(name, value)
    bucket, recipe, folder = radosgw.new_bucket(), str(site.run_file), site.run_file.parent
    here = {"recipe": recipe, "store": f"s3://{bucket}/store"}
    run(
        RunRequest(
            recipe, (f"resources.storage.scratch={folder / 'scratch'}",), here["store"]
        ).command("prompts"),
        env=site.env,
    )
    with temporary_settings({PREFECT_API_URL: site.url}):
        Secret(value=KEY_IN_BLOCK).save("servers-key")
    kept_in = {
        KEY_IN_ENVIRONMENT: f"resources.servers.api_key_env={KEY_VARIABLE}",
        KEY_IN_BLOCK: "resources.servers.api_key_secret=servers-key",
    }
    for (key, where), shards in zip(kept_in.items(), ("0-2", "3-5"), strict=True):
        with answer_server(models=(), key=key) as server:
            ask = [
                "answers.engine=openai",
                f'resources.servers.endpoints=["{server.url}"]',
                f"resources.storage.scratch={folder / 'scratch'}",
                where,
            ]
            site.deployment_run("regenerate/demo", overrides=ask, shards=shards, **here)
            assert len(server.bodies) == 6, "the key opened the door"
    secrets = [KEY_IN_ENVIRONMENT, KEY_IN_BLOCK, SECRET_KEY, HOOK_TOKEN]
    # database, both logs, store, scratch
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    left |= {
        name: radosgw.client.get_object(Bucket=bucket, Key=name)["Body"].read()
        for name in names_in(radosgw, bucket)
    }
    left |= {f"api: {name}": body.encode() for name, body in told_by_the_api(site).items()}
    assert (
        len(names_in(radosgw, bucket)) > 20
        and b"answers 0000-0002" in left["api: logs"]
        and b"materialization" in left["api: events"]
    )
    assert any(path.name == "prefect.db" for path in left if isinstance(path, Path))
    assert [
        (name, secret)
        for name, body in left.items()
        for secret in secrets
        if secret.encode() in body
    ] == []


def s3_keys(site: Site) -> dict[str, str]:
    return {name: value for name, value in site.env.items() if name.startswith("AWS_")}


def names_in(radosgw: Radosgw, bucket: str) -> list[str]:
    return [found["Key"] for found in radosgw.client.list_objects_v2(Bucket=bucket)["Contents"]]


def told_by_the_api(site: Site) -> dict[str, str]:
    """Everything that any client may read from the server, as it is sent."""
    options = (
        "flow_runs",
        "task_runs",
        "deployments",
        "artifacts",
        "automations",
        "block_documents",
        "work_pools",
        "variables",
        "logs",
    )
    found = {name: paged(site, name) for name in options}
    return {**found, "events": site.post("events/filter", filter={}, limit=50).text}


def paged(site: Site, name: str, page: int = 200) -> str:
    """All pages of a list; automations alone come at once."""
    if name == "automations":
        return site.post(f"{name}/filter").text
    pages, offset = [site.post(f"{name}/filter", limit=page, offset=0)], 0
    while len(pages[-1].json()) == page:
        offset += page
        pages.append(site.post(f"{name}/filter", limit=page, offset=offset))
    return "".join(answer.raise_for_status().text for answer in pages)
