"""`python -m flows <name>`: one command, no server set up; mistakes are one paragraph, and
nothing outlives the run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.process.launch import RunRequest
from deepspec.process.scopes import MARK
from flows.server import start_private_server
from tests.conftest import REPOSITORY, tiny_run
from tests.flows.conftest import QUICK, SERVED, home_with, questions

SETS = [word for override in QUICK for word in ("--set", override)]


def environment(**changes: str) -> dict[str, str]:
    """As a user's shell: nothing of Prefect is set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **changes}


def flow_command(flow: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "flows", flow, *map(str, arguments)]


def run(
    command: list[str], env: dict[str, str], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY,
        check=False,
    )


@pytest.fixture(scope="session")
def prefect_home(database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(home_with(database, tmp_path_factory.mktemp("prefect") / "home"))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["dem"], "did you mean 'demo'"),
        (["demo", "--set", "train.lrr=1"], "did you mean 'lr'"),
        (["demo", "--set", "train.lr=fast"], "train.lr"),
        (["nowhere.yaml"], "cannot be read"),
        (["demo", "--shards", "17"], "has no shards"),
        (["demo", "--store", "/proc/nowhere"], "cannot write"),
        (
            [
                "demo",
                "--set",
                "prompts.source={kind: files, paths: [/nowhere.jsonl]}",
                "--store",
                "STORE",
            ],
            "/nowhere.jsonl",
        ),
    ],
)
def test_a_users_mistake_is_one_paragraph_and_exit_code_2(
    arguments: list[str], shown: str, tmp_path: Path
):
    arguments = [argument.replace("STORE", str(tmp_path)) for argument in arguments]
    found = run(flow_command("pipeline", *arguments), environment(HOME=str(tmp_path)))
    assert found.returncode == 2, found.stderr
    assert shown in found.stderr and "fix: " in found.stderr and "Traceback" not in found.stderr
    assert found.stdout == ""


def test_a_server_that_does_not_answer_is_named(run_file: Path):
    found = run(
        flow_command("prepare", run_file), environment(PREFECT_API_URL="http://127.0.0.1:9/api")
    )
    assert found.returncode == 2
    assert "http://127.0.0.1:9/api" in found.stderr and "Traceback" not in found.stderr


def test_a_private_server_that_cannot_start_says_why(run_file: Path, prefect_home: str):
    broken = environment(
        PREFECT_HOME=prefect_home, PREFECT_SERVER_DATABASE_CONNECTION_URL="nonsense://x"
    )
    found = run(flow_command("prepare", run_file), broken)
    assert found.returncode == 2, found.stderr
    assert "private server did not start" in found.stderr and "server.log" in found.stderr


def test_a_user_who_has_a_server_gets_no_private_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    monkeypatch.setenv("PREFECT_API_URL", "http://somewhere/api")
    assert start_private_server(None) is None
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    (tmp_path / "profiles.toml").write_text(
        'active = "site"\n[profiles.site]\nPREFECT_API_URL = "http://site/api"\n'
    )
    assert start_private_server(None) is None


LANES = 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_behind_and_keeps_what_it_made(
    run_file: Path, prefect_home: str, number: signal.Signals
):
    """Two lanes, each with a server of the target that it started, which answers the first
    shard of each and then no more.
    """
    questions(run_file, answered=(0, 3))
    request = RunRequest(str(run_file), (*SERVED, f"resources.devices.lanes={LANES}"))
    env, config = (
        environment(PREFECT_HOME=prefect_home),
        load_run(request.source, request.overrides),
    )
    command = flow_command("prepare", *request.arguments())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # As from a terminal: what a shell runs in the background ignores SIGINT, and so would this
    # process's children.
    process = subprocess.Popen(
        command,
        env=env,
        cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )
    wait_until(lambda: stage_status(Run(config), "answers").committed == LANES)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    children = [one for one in everyone if MARK in one.environ()]
    assert len(children) == 4 * LANES, "each lane's child, its server, and the guards of both"
    assert len(everyone) >= 4 * LANES + 3, "and the run, Prefect's server and its guard"
    process.send_signal(number)
    assert psutil.wait_procs(children, timeout=15)[1] == []
    stderr = process.communicate(timeout=60)[1]  # Prefect takes its time to close on a busy machine
    assert psutil.wait_procs(everyone, timeout=15)[1] == []
    assert "Traceback" not in stderr
    if number == signal.SIGINT:
        assert process.returncode == 130 and "interrupted" in stderr
    kept = stage_status(Run(config), "answers")
    assert (kept.committed, kept.missing) == (LANES, [1, 2, 4, 5])


def wait_until(true, seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.1)


@pytest.mark.long
def test_one_command_makes_everything_and_a_second_one_nothing_even_without_prefects_database(
    store: Path, database: Path
):
    home_with(database, store / ".prefect")
    arguments = ("demo", *SETS, "--store", store)
    first = run(
        [sys.executable, "-m", "flows.pipeline", *map(str, arguments)],
        environment(HOME=str(store.parent)),
    )
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert set(summary) == {
        "acceptance_length",
        "lossless",
        "speedup",
        "seconds",
        "peak_rss_bytes",
        "result",
    }
    assert set(summary["acceptance_length"]) == {"macro", "math", "code", "chat"}
    assert summary["lossless"][0] == summary["lossless"][1] and summary["peak_rss_bytes"] > 1e8
    assert Path(summary["result"], "summary.json").exists()
    config = tiny_run(store, *QUICK)
    before = {
        stage: Run(config).artifact(stage).manifest()
        for stage in [stage.name for stage in Run(config).stages]
    }
    assert all(before.values())

    shutil.rmtree(store / ".prefect")
    second = run(flow_command("pipeline", *arguments), environment(HOME=str(store.parent)))
    assert second.returncode == 0
    assert second.stdout.count("already done") == len([stage.name for stage in Run(config).stages])
    assert {
        stage: Run(config).artifact(stage).manifest()
        for stage in [stage.name for stage in Run(config).stages]
    } == before
