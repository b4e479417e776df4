"""Servers that a stage starts for itself: up in time or refused with the reason, and gone
whatever happens.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.config.run import RunConfig
from deepspec.errors import ChildFailed, ConfigError, TransientError
from deepspec.prompts.stage import run_prompts
from deepspec.serving.managed_server import serve_command
from tests.conftest import tiny_run
from tests.processes import command_of, marked

MARK = "TEST_SERVE"  # in the environment of a test's processes

SCRIPTED = [sys.executable, "-m", "tests.answer_server", "{port}", "{name}"]


def serving_run(store: Path, command: list[str], *settings: str) -> RunConfig:
    server = (
        "answers.engine=openai",
        "resources.servers.start=vllm",
        f"resources.servers.start_command={json.dumps(command)}",
    )
    return tiny_run(store, *server, "resources.servers.lost_s=30", *settings)


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts inherits it, servers of a child included."""
    monkeypatch.setenv(MARK, str(tmp_path))


def left_over(words: str) -> list[str]:
    """Command lines of this test's processes."""
    return [command_of(process) for process in marked(MARK, os.environ[MARK], words)]


def test_a_server_is_started_used_and_taken_down(store: Path):
    config = serving_run(store, SCRIPTED)
    run_prompts(Run(config))
    artifact = run_answers(Run(config))
    assert artifact.manifest() is not None
    assert left_over("tests.answer_server") == []
    (log,) = Path(artifact.store.root, artifact.folder, "logs").glob("serve-*.log")
    assert log.exists()


def test_a_server_that_dies_is_started_again_and_nothing_is_lost(store: Path):
    # 24 answers in all
    config = serving_run(store, [*SCRIPTED, "10"], "resources.servers.requests=2")
    run_prompts(Run(config))
    assert run_answers(Run(config)).manifest() is not None
    assert left_over("tests.answer_server") == []


def test_a_server_that_dies_again_and_again_ends_the_stage_and_the_next_run_goes_on(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nobody waits `lost_s` for what will not come; what was answered between its deaths is
    kept.
    """
    monkeypatch.setattr("deepspec.serving.managed_server.RESTARTS", 1)
    config = serving_run(store, [*SCRIPTED, "10"], "resources.servers.requests=2")
    run_prompts(Run(config))
    with pytest.raises(TransientError, match="the server died 2 times"):
        run_answers(Run(config))
    assert left_over("tests.answer_server") == []
    assert run_answers(Run(config)).manifest() is not None


@pytest.mark.parametrize(
    ("command", "error", "says"),
    [
        (["no-such-program"], ConfigError, "no program 'no-such-program'"),
        (
            [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"],
            ChildFailed,
            "out of memory",
        ),
        (
            [sys.executable, "-c", "import time; time.sleep(987)"],
            TransientError,
            "not up within 1 s",
        ),
    ],
)
def test_a_server_that_does_not_come_up_is_one_clear_error(
    store: Path, command: list[str], error: type[Exception], says: str
):
    # long enough for one that ends by itself on a busy machine
    deadline_s = 1 if error is TransientError else 60
    config = serving_run(store, command, f"resources.servers.start_deadline_s={deadline_s}")
    run_prompts(Run(config))
    with pytest.raises(error, match=says):
        run_answers(Run(config))
    assert left_over("time.sleep(987)") == []


# As vLLM 0.32 ends: what its engine died of, the same once more, and 40 lines of stack of the
# server that waited for it.
DYING = """
frames = ['  File "core.py", line 1482, in run', '    raise ValueError(', '          ^^^^^^']
print('INFO:     127.0.0.1:37914 - "GET /health HTTP/1.1" 503 Service Unavailable')
for line in ['Traceback (most recent call last):', *frames, 'ValueError: No memory for the cache']:
    print('(EngineCore pid=7) ERROR 12-01 18:06:01 [core.py:1510]', line)
print('(EngineCore pid=7) INFO 12-01 18:06:01 [executor.py:479] [shutdown] waiting for workers')
print('Traceback (most recent call last):', *frames * 14, 'RuntimeError: See root cause above.',
      'resource_tracker.py:254: UserWarning: 1 leaked object', '  warnings.warn(', sep='\\n')
print(*['INFO:     127.0.0.1:37914 - "POST /v1/chat/completions HTTP/1.1" 500'] * 9, sep='\\n')
raise SystemExit(1)
"""


def test_what_a_server_died_of_is_in_the_error_whatever_it_wrote_after_it(store: Path):
    """The last eight lines were frames of the stack above, or its access log."""
    config = serving_run(store, [sys.executable, "-c", DYING])
    run_prompts(Run(config))
    with pytest.raises(ChildFailed) as caught:
        run_answers(Run(config))
    assert "ValueError: No memory for the cache" in caught.value.what
    assert "RuntimeError: See root cause above." in caught.value.what
    for noise in ("HTTP/1.1", 'core.py", line', "^^^^"):
        assert noise not in caught.value.what


def test_the_server_ends_with_a_stage_that_is_killed(store: Path, tmp_path: Path):
    """SIGKILL, where nobody can clean up: the guard sees its lifeline end."""
    config = serving_run(store, SCRIPTED)
    run_prompts(Run(config))
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    stage = subprocess.Popen(
        [sys.executable, "-m", "deepspec", "answers", str(tmp_path / "run.yaml")],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not left_over("-m tests.answer_server") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_over("-m tests.answer_server")
    os.kill(stage.pid, signal.SIGKILL)
    stage.wait()
    while left_over("tests.answer_server") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over("tests.answer_server") == []


@pytest.mark.parametrize("program", ["vllm", "sglang", "transformers"])
def test_the_command_names_model_port_and_format(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.which", lambda name, path=None: name)
    config = tiny_run(
        tmp_path,
        "answers.engine=openai",
        f"resources.servers.start={program}",
        "resources.devices.type=cpu",
    )
    command = " ".join(serve_command(config, model="a/model", port=1234))
    for words in ("a/model", "--host 127.0.0.1", "--port 1234", f"--dtype {config.target.dtype}"):
        assert words in command
    assert "{" not in command
    config = config.with_resources(devices={"gpus_per_lane": 2})
    spread = " ".join(serve_command(config, model="a/model", port=1234))
    assert ("--tensor-parallel-size 2" in spread) == (program != "transformers")
    quiet = {"vllm": "--disable-uvicorn-access-log", "sglang": "--log-level-http warning"}
    assert quiet.get(program, "") in command


def test_servers_given_and_servers_started_are_one_too_many(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"either resources\.servers\.endpoints"):
        tiny_run(
            tmp_path,
            "answers.engine=openai",
            "resources.servers.start=vllm",
            'resources.servers.endpoints=["http://127.0.0.1:1/v1"]',
        )
    with pytest.raises(ConfigError, match="does not know it"):
        tiny_run(
            tmp_path,
            "answers.engine=openai",
            "resources.servers.start=transformers",
            "answers.sampling.presence_penalty=1",
        )
