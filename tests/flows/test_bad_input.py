"""What cannot be done as requested is one paragraph in the run's log (what, where, fix), and
nothing is made or written before it.
"""

import contextlib
import json
import logging
import socket
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Log
from prefect.client.schemas.sorting import LogSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import State

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError, UserError
from deepspec.process.launch import RunRequest
from deepspec.prompts.stage import run_prompts
from flows.cli import run_flow
from flows.local_executor import server_key
from flows.pipeline import pipeline, regenerate
from flows.plain_errors import FLOW_RUNS, log_errors_plainly
from flows.tasks import run_stages
from tests.flows.conftest import flaky_run
from tests.flows.test_cli import environment, flow_command, run

ERROR = 40


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield flaky_run(tmp_path_factory.mktemp("wrong"), monkeypatch)


def logs_of(state: State) -> list[Log]:
    """The run's log as the UI shows it, complete: Prefect's own last line comes after every
    other.
    """
    run_id = state.state_details.flow_run_id
    limit = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            found = client.read_logs(
                LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), sort=LogSort.TIMESTAMP_ASC
            )
            if any(line.message.startswith("Finished in state") for line in found):
                return found
            assert time.monotonic() < limit, "the log did not arrive"
            time.sleep(0.2)


def refusal(state: State) -> str:
    """The only error in the log of a run that failed, apart from Prefect's last line, which
    repeats it.
    """
    assert state.is_failed()
    lines = logs_of(state)
    assert not any("Traceback" in line.message for line in lines)
    (shown,) = [
        line.message
        for line in lines
        if line.level >= ERROR and not line.message.startswith("Finished in state")
    ]
    return shown


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        ({"overrides": ("answers.seeed=3",)}, "answers.seeed: there is no such field"),
        ({"overrides": ("answers.temperature=hot",)}, "answers.temperature"),
        ({"recipe": "nowhere.yaml"}, "the run file cannot be read"),
        ({"shards": "17"}, "the stage 'answers'"),
        ({"shards": "5-3"}, "'5-3' is not a shard or a range of shards"),
        ({"store": "/proc/nowhere"}, "cannot write"),
        ({"store": "s3://key:hidden-word@bucket"}, "keys do not belong into a store's URL"),
    ],
)
def test_a_run_that_cannot_be_says_so_in_its_log_in_one_paragraph(
    run_file: Path, parameters: dict[str, object], shown: str
):
    refused = refusal(regenerate(**{"recipe": str(run_file), **parameters}, return_state=True))
    assert shown in refused and "\n  fix: " in refused and "hidden-word" not in refused
    assert stage_status(Run(load_run(str(run_file))), "answers").committed == 0


def test_the_parts_of_a_pipeline_are_not_begun_where_the_whole_cannot_be(run_file: Path):
    with get_client(sync_client=True) as client:
        before = len(client.read_flow_runs())
        assert "there is no such field" in refusal(
            pipeline(recipe=str(run_file), overrides=("train.lrr=1",), return_state=True)
        )
        assert len(client.read_flow_runs()) == before + 1


@pytest.mark.parametrize(
    ("variable", "value", "bucket", "shown"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", None, "cannot reach the store"),
        ("AWS_SECRET_ACCESS_KEY", "not-the-secret", None, "the server refuses these credentials"),
        (None, None, "no-such-bucket", "there is no such bucket"),
    ],
)
def test_a_bucket_that_the_worker_cannot_use_is_named(
    run_file: Path,
    s3_url: str,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    value: str | None,
    bucket: str | None,
    shown: str,
):
    if variable:
        monkeypatch.setenv(variable, value)
    store = f"s3://{bucket}/store" if bucket else s3_url
    refused = refusal(regenerate(recipe=str(run_file), store=store, return_state=True))
    assert shown in refused and store in refused and "\n  fix: " in refused
    assert "deepspec-test-secret" not in refused


@contextlib.contextmanager
def old_server() -> Iterator[str]:
    """Answers what Prefect 3.7 would to whoever asks for its health and its version."""

    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'"3.7.9"' if self.path.endswith("/admin/version") else b"true"
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()


def test_a_run_by_hand_and_a_workers_run_refuse_a_server_of_another_version(run_file: Path):
    with old_server() as url:
        found = run(flow_command("prepare", run_file), environment(PREFECT_API_URL=url))
        assert (
            found.returncode == 2
            and "the Prefect server has version 3.7.9, which does not fit" in found.stderr
        )
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(UserError, match=r"3\.7\.9, which does not fit"),
        ):
            run_stages(RunRequest(str(run_file)), ("prompts",))
    assert stage_status(Run(load_run(str(run_file))), "prompts").committed == 0


@pytest.mark.slow
def test_a_server_that_accepts_and_never_answers_is_given_up_soon(run_file: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = run(
            flow_command("prepare", run_file),
            environment(PREFECT_API_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/api"),
        )
    assert (
        found.returncode == 2
        and "the Prefect server does not answer" in found.stderr
        and "Traceback" not in found.stderr
    )


def test_at_its_end_a_run_does_not_wait_for_ever_for_a_server_that_hangs():
    """Prefect's own threads wait: seven events that a stopped server did not take kept a run
    that was over for a quarter of an hour.
    """
    script = (
        "import threading; from flows.cli import end_in_time; "
        "end_in_time(7, 0.2); threading.Event().wait(600)"
    )
    assert run([sys.executable, "-c", script], environment()).returncode == 7


def test_an_error_that_prefect_writes_twice_is_in_a_runs_log_once():
    """A worker's process wrote it when the flow failed and again when the process ended; a
    parent's log has it, too.
    """
    log_errors_plainly()
    logger, error = logging.getLogger(FLOW_RUNS), UserError("it cannot be", fix="do something else")
    written = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: written.append(f"{vars(record)['flow_run_id']}: {record.msg}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        for run in ("a", "a", "parent"):
            logger.error("Engine execution exited", exc_info=error, extra={"flow_run_id": run})
    finally:
        logger.removeHandler(handler)
    assert written == [f"a: {error}", f"parent: {error}"]


def test_a_stage_that_cannot_begin_is_not_shown_as_running(run_file: Path):
    run_prompts(Run(load_run(str(run_file))))
    wrong = (
        "answers.engine=openai",
        "resources.servers.start=vllm",
        "resources.servers.api_key_secret=nowhere",
    )
    assert "there is no Secret block of this name" in refusal(
        regenerate(recipe=str(run_file), overrides=wrong, return_state=True)
    )
    progress, failure = Artifact.get("flaky-answers"), Artifact.get("flaky-failure")
    assert progress is not None and "failed: 0 of 6 shards" in str(progress.description)
    assert failure is not None and "### Once that is corrected, the same run again" in str(
        failure.data
    )


def test_only_stages_that_send_requests_load_the_servers_key(run_file: Path):
    secret = "resources.servers.api_key_secret=nowhere"
    here, served = (
        load_run(str(run_file), [secret, f"evaluate.engine={engine}"])
        for engine in ("in_process", "vllm")
    )
    assert server_key(here, "evaluate") == server_key(served, "hidden") == {}
    for config, stage in ((here, "answers"), (served, "evaluate")):
        with pytest.raises(ConfigError, match="no Secret block"):
            server_key(config, stage)


def test_shards_by_hand_may_be_written_as_people_do(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`1,  2` was refused by the flow's own pattern, and reported as a lost server that may
    answer later.
    """
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    run_prompts(Run(load_run(str(run_file))))
    run_flow("regenerate", RunRequest(str(run_file)), " 1,  2,")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"]
    assert stage_status(Run(load_run(str(run_file))), "answers").missing == [0, 3, 4, 5]
